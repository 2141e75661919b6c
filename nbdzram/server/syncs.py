"""FLUSH and FUA where something lies on a disk: the arena's pages are written there before the answer, or a journal is
(journal.py).

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
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from nbdzram.engine.disk import Disk
from nbdzram.machine import Machine
from nbdzram.server.steadily import Patience

NO_JOURNALS: Mapping[str, Sync] = MappingProxyType({})


class Sync(ABC):
    """What FLUSH waits for, of a pool. Used on the event loop only."""

    def __init__(self) -> None:
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def synced(self) -> None:
        """Return once everything that was stored before this call is on the disk. Raises OSError."""
        if self._next is None:
            self._next = asyncio.create_task(self._sync_after(self._running))
            self._next.add_done_callback(lambda sync: sync.cancelled() or sync.exception())  # also if nobody waits now
        await asyncio.shield(self._next)

    def fails(self, _disk: Disk) -> bool:
        """Whether what this disk holds is not on the disk below, though all else is: behind synced()."""
        return False

    @abstractmethod
    async def _sync(self) -> None:
        """Bring to the disk what is stored when this is called. Raises OSError."""

    async def _sync_after(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        await self._sync()


class ArenaSync(Sync):
    """One arena's file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = _identity(os.fstat(self._descriptor))
        self._thread = ThreadPoolExecutor(1, "nbdzram-sync")
        self._patience = Patience(f"FLUSH waits for the disk of {path}")
        self._failed: OSError | None = None

    async def _sync(self) -> None:
        if self._failed is None:
            try:
                with self._patience:
                    await asyncio.get_running_loop().run_in_executor(self._thread, os.fdatasync, self._descriptor)
            except OSError as error:
                self._failed = error
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Nobody waits any more. What is under way ends before the descriptor is another file's."""
        self._thread.submit(os.close, self._descriptor)
        self._thread.shutdown(wait=False)


class Syncs:
    """Those of all pools, made when the first client attaches to one."""

    def __init__(self, machine: Machine | None = None, journals: Mapping[str, Sync] = NO_JOURNALS) -> None:
        """`journals`: of the pools whose FLUSH waits for a journal, by name."""
        self._machine = machine or Machine()
        self._journals = journals
        self._by_path: dict[str, ArenaSync] = {}

    def of(self, pool_name: str, path: str | None) -> Sync | None:
        """What FLUSH waits for; None where there is no disk below."""
        if pool_name in self._journals:
            return self._journals[pool_name]
        if path is None or self._machine.keeps_in_memory(Path(path)):
            return None
        known = self._by_path.get(path)
        if known is not None and known.identity != _identity(Path(path).stat()):  # a pool was removed, one made anew
            known.close()
            known = None
        if known is None:
            known = self._by_path[path] = ArenaSync(Path(path))
        return known

    def let_go(self, path: str) -> None:
        """The pool there is removed: a file that is open keeps its room on the disk."""
        known = self._by_path.pop(path, None)
        if known is not None:
            known.close()

    def close(self) -> None:
        """The server ends: no client is attached."""
        for known in self._by_path.values():
            known.close()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
