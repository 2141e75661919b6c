"""How far a stream of bytes has come, on a terminal's standard error; nothing elsewhere. And that it is where it
went."""

from __future__ import annotations

import os
import stat
import sys
import time
from types import TracebackType
from typing import Self

from nbdzram.cli.terminals import may_draw_on
from nbdzram.units import format_size

EVERY_SECONDS = 0.5
CLEAR = "\r\033[K"


def settle(descriptor: int) -> None:
    """Return once the disk has what a file was given; who reads a pipe has his own. Raises OSError.

    Success is told behind it: also an error that a file system keeps to itself until then (no room, over a network).
    """
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fsync(descriptor)


class Meter:
    """A context manager that shows `what` has passed, and how fast."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shows = may_draw_on(sys.stderr)
        self._began = time.monotonic()
        self._shown = self._began
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()

    def passed(self, count: int) -> None:
        """So many bytes more."""
        self._bytes += count
        now = time.monotonic()
        if self._shows and now - self._shown >= EVERY_SECONDS:
            self._shown = now
            rate = format_size(int(self._bytes / (now - self._began)))
            sys.stderr.write(f"{CLEAR}{self._what} {format_size(self._bytes)}, {rate}/s")
            sys.stderr.flush()
