"""What exports cost, from walks over their block tables: off the event loop, and seldom enough.

A walk takes about 15 ms a stored GiB. People ask (`nbdzram stat`), and so do pages that refresh themselves, so one
answer serves everyone who asks while it is fresh: a walk that took t seconds of a processor is not repeated within REST
times t. However many ask, walks take at most 1/(REST + 1) of one processor core. What a walk waits, for a thread or for
a processor that others have, is no reason for a rest: a busy machine would be told old figures, for minutes.
"""

from __future__ import annotations

import asyncio
import logging
import time

from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.stats import DiskUsage
from nbdzram.server.exports import Exports

log = logging.getLogger("nbdzram.server")

REST = 19  # times the walk: 5 % of one core
EXTENTS_AT_ONCE = 1024  # what one hold of the pool's lock gives


class Usages:
    """The last walk over all exports, and the next one when it is due. Lives on the event loop."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._walking: asyncio.Task[dict[str, DiskUsage]] | None = None
        self._found: dict[str, DiskUsage] = {}
        self._fresh_until = 0.0
        self._ended: float | None = None
        self._stopping = False

    async def now(self) -> dict[str, DiskUsage]:
        """By export's name. Exports made since the last walk are a reason for the next: they have shares in others'."""
        if self._walking is None:
            complete = all(export.name in self._found for export in self._exports)
            if self._stopping or (complete and time.monotonic() < self._fresh_until):
                return self._found
            self._walking = asyncio.create_task(self._walk())
        return await asyncio.shield(self._walking)  # an asker who goes away does not end it for the others

    def so_far(self) -> tuple[dict[str, DiskUsage], float | None]:
        """The same without waiting, from the last walk, and its age in seconds (None: there was none yet)."""
        now = time.monotonic()
        if self._walking is None and not self._stopping and now >= self._fresh_until:
            self._walking = asyncio.create_task(self._walk())
            self._walking.add_done_callback(_take_note)
        return self._found, None if self._ended is None else now - self._ended

    async def stop(self) -> None:
        """Wait for the walk under way to leave the pools; start none any more."""
        self._stopping = True
        if self._walking is not None:
            await self._walking

    async def _walk(self) -> dict[str, DiskUsage]:
        spent, found = 0.0, {}
        try:
            for export in self._exports:
                if self._stopping:
                    break
                found[export.name], seconds = await asyncio.to_thread(_cost_of, export.disk)
                spent += seconds
        finally:
            self._walking = None
        ended = time.monotonic()
        self._found, self._ended, self._fresh_until = found, ended, ended + REST * spent
        return found


def _cost_of(disk: Disk) -> tuple[DiskUsage, float]:
    """What its blocks cost, and how many seconds of a processor it took to find that."""
    began = time.thread_time()
    return disk.usage(), time.thread_time() - began


def stored_behind(disk: Disk, offset: int) -> int:
    """Bytes of blocks that are stored from `offset` on. Takes a table walk: not on an event loop."""
    if offset == 0:
        return disk.stats().stored
    stored, size = 0, disk.size_bytes
    while offset < size:
        extents = disk.extents(offset, size - offset, EXTENTS_AT_ONCE, Extent.HOLE)
        stored += sum(length for length, kind in extents if not kind & Extent.HOLE)
        offset += sum(length for length, _ in extents)
    return stored


def _take_note(walk: asyncio.Task[dict[str, DiskUsage]]) -> None:
    if not walk.cancelled() and walk.exception() is not None:
        log.error("counting what exports cost failed", exc_info=walk.exception())
