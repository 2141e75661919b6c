"""A file that a start reads, however long that takes: who stops the server meanwhile need not wait for its end."""

from __future__ import annotations

import io
import os
import select
from pathlib import Path
from threading import Event
from typing import BinaryIO

from nbdzram.errors import UserError

LOOK_MILLISECONDS = 100
"""How often is looked whether to stop, where nothing comes."""

BUFFER_BYTES = 1 << 20


def open_source(path: Path, told_to_stop: Event) -> BinaryIO:
    """A file, a device, or a pipe, which need have no writer yet. Raises OSError.

    Reading raises UserError once `told_to_stop` is set.
    """
    return io.BufferedReader(_Source(path, told_to_stop), BUFFER_BYTES)


class _Source(io.RawIOBase):
    def __init__(self, path: Path, told_to_stop: Event) -> None:
        self._path, self._told_to_stop = path, told_to_stop
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # waits for no writer of a pipe
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._told_to_stop.is_set():
                raise UserError(f"reading {self._path} was interrupted; nothing of it is kept")
            if self._poll.poll(LOOK_MILLISECONDS):  # where a pipe had no writer yet, reading would be its end
                return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
