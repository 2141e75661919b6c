"""Long texts, made on the event loop without holding it.

A scrape of a hundred exports is 600 KB of text. A thread would not help: it holds the interpreter's lock for 5 ms at a
time, fifty times as long as a slice here. So whoever makes a text yields it in pieces, and clients are served between
two slices.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator

SLICE_SECONDS = 0.0001
"""A client that comes meanwhile waits so long, and for what a piece takes. Short slices cost nothing that was measured:
a scrape of 100 exports takes 7.8 ms of processor time with 0.5, 0.2, 0.1 and 0.05 ms."""


Pause = Callable[[], Awaitable[None]]


async def join_in_slices(pieces: Iterator[str], pause: Pause) -> bytearray:
    """The pieces in one, made in slices of SLICE_SECONDS and what the last piece takes; `pause` serves others.

    In UTF-8, as they are sent, and in place: to join 600 KB at the end and to encode them takes 1 to 3 ms, most of it
    for fresh pages of memory.
    """
    text = bytearray()

    def join() -> Iterator[None]:
        for piece in pieces:
            text.extend(piece.encode())
            yield

    await walk_in_slices(join(), pause)
    return text


async def walk_in_slices(steps: Iterator[None], pause: Pause) -> None:
    """Take all steps, and pause when SLICE_SECONDS are over."""
    due = time.perf_counter() + SLICE_SECONDS
    for _ in steps:
        if time.perf_counter() >= due:
            await pause()
            due = time.perf_counter() + SLICE_SECONDS
