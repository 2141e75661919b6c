"""What a keeper of a device says, without waiting for whoever listens: a thread of its own writes it.

Standard error may lead to where the kept device is needed: to a file on that disk, to one in a tmpfs that is swapped
out to it, to a journal whose process is. Then the line that tells of a lost connection waits for the connection, and
would keep from making it whoever waited for the line.

    say ──> queue, LINES_MAX ──> thread ──> write(2)      only the thread ever waits; lines come in their order

A line that finds the queue full is left out: whoever listens has been silent for longer than anybody remembers.
"""

from __future__ import annotations

import os
import queue
import threading
from types import TracebackType
from typing import Self

LINES_MAX = 256
"""A restart is two lines; a listener that stands still for a hundred restarts is not told of the others."""
ENDING_SECONDS = 2.0
"""How long an end waits for what was said before it: a listener that is slow and no more has taken it by then."""


class Voice:
    """Writes lines to a descriptor, which stays the caller's."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        # A daemon: one that stands in a write which never ends keeps no process from ending.
        self._thread = threading.Thread(target=self._write_all, name="voice", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """Have a line written, at some time; never waits."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all was written, for so long as is worth it."""
        try:
            self._lines.put(None, timeout=ENDING_SECONDS)
        except queue.Full:
            return
        self._thread.join(ENDING_SECONDS)

    def _write_all(self) -> None:
        while (text := self._lines.get()) is not None:
            left = f"{text}\n".encode()
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                continue  # nobody listens any more, which is no reason to end
