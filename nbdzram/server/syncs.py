"""FLUSH and FUA where the state directory lies on a disk: the arena's pages are written there before the answer.

What is stored lies in a mapped file, so an answered write outlives the process in any case; the kernel writes the pages
to a disk when it likes. A sync makes it do so now. It takes milliseconds, so it has a thread of its own, for each pool,
and never runs on the event loop, nor on the workers, whom a slow disk would keep from serving others.

    FLUSH ─┐                       one sync under way ──> its answers
    FLUSH ─┼─> the next sync: begins when that one has ended, and answers all who came meanwhile
    FUA   ─┘

Invariants
1. A request is answered by a sync that began after it came: whatever had been answered before it is then on the disk.
2. At most one sync of a pool runs and one waits, however many clients ask.
3. A sync that failed fails all later ones: the kernel forgets what it could not write (fsync(2), "EIO"), so another
   that succeeded would prove nothing. Opening the pool anew is what mends it.

In memory (tmpfs) there is no disk to wait for, and nobody waits. What FLUSH promises, and what not:
docs/howto/survive-a-restart.md.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdzram.machine import Machine


class ArenaSync:
    """One arena's file. Used on the event loop only."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = _identity(os.fstat(self._descriptor))
        self._thread = ThreadPoolExecutor(1, "nbdzram-sync")
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None
        self._failed: OSError | None = None

    async def synced(self) -> None:
        """Return once everything that was stored before this call is on the disk. Raises OSError."""
        if self._next is None:
            self._next = asyncio.create_task(self._sync_after(self._running))
        await asyncio.shield(self._next)

    async def _sync_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        if self._failed is None:
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, os.fdatasync, self._descriptor)
            except OSError as error:
                self._failed = error
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Nobody waits any more."""
        self._thread.shutdown(wait=False)
        os.close(self._descriptor)


class Syncs:
    """Those of all pools, made when the first client attaches to one."""

    def __init__(self, machine: Machine | None = None) -> None:
        self._machine = machine or Machine()
        self._by_path: dict[str, ArenaSync] = {}

    def of(self, path: str | None) -> ArenaSync | None:
        """What FLUSH waits for; None where there is no disk below."""
        if path is None or self._machine.keeps_in_memory(Path(path)):
            return None
        known = self._by_path.get(path)
        if known is None or known.identity != _identity(Path(path).stat()):  # a pool was removed, and one made anew
            known = self._by_path[path] = ArenaSync(Path(path))
        return known

    def close(self) -> None:
        """The server ends: no client is attached."""
        for known in self._by_path.values():
            known.close()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
