"""An administrator's act is answered as done when the disk of the checkpoints has it, or of it what a start must know.

    the act is made ── a group of the journal tells it ── changes.json is replaced ── it is answered

The journal tells what exports are. What it does not tell lies beside it, as a state directory would have it
(state.py): what was declared when something was changed, so that a start knows whether the change still holds; what was
removed and is declared; pools that were added or changed. Without a journal a checkpoint tells what exports hold, and
the file, which is newer, who may attach and what else was said of them.

Invariants
1. What was answered is in both: the file is replaced behind the group that tells the act. One of them may know of an
   act alone that was not answered: the journal where the power fails between the two, the file where the act was
   remembered, and not made yet as the group's moment was taken. Then the journal says what exports are (restore.py).
2. It is written by one after the other, each with all that was changed before it, and by who has the directory.
3. Before a checkpoint stands it is there: written again if what was written is not there any more, as where another
   directory is at the path now (claim.py).
4. Of pools it is ahead: it knows one before an export may lie there, and more room before somebody may fill it, until
   the journal, or a checkpoint without one, has that there is less. A start needs all that it has to lie somewhere.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.server.exports import Export
from nbdzram.server.state import FILE_NAME, FileId, Remembered, State, file_at, note_in
from nbdzram.server.syncs import Sync

SETTLE_SECONDS = 30
"""For an administrator, who can look again; the first checkpoint of a large server may take minutes."""

log = logging.getLogger("nbdzram.server")


class Settling:
    """Of one server. Used on the event loop."""

    def __init__(self, directory: Path, journal: Sync | None, is_ours: Callable[[], bool]) -> None:
        """is_ours: no other server keeps its checkpoints in the directory."""
        self._directory = directory
        self._journal = journal
        self._is_ours = is_ours
        self._memory = State(None)
        self._noted = Remembered()  # last, or what the server began with
        self._ahead: set[str] = set()  # pools that are known before all else that was changed is noted
        self._file: FileId | None = None  # which has that; None: another process wrote what is there, if anything
        self._writing: asyncio.Task[None] | None = None  # to its end, also when whoever began it waits no longer
        self._turn = asyncio.Lock()

    def begin(self, memory: State, noted: Remembered) -> None:
        """The server has started; `memory` is what it remembers, `noted` what was here then.

        What another process served may have other pools than the last checkpoint.
        """
        self._memory = memory
        self._noted = memory.changes
        if self._journal is None:
            added = {name: pool for name, pool in memory.changes.pools.items() if pool.declared is None}
            self._noted = replace(memory.changes, pools=added | noted.pools)

    async def know_pool(self, name: str) -> None:
        """Return once a start has the pool, and as much room there as is remembered now. Raises OSError."""
        self._ahead.add(name)
        async with asyncio.timeout(SETTLE_SECONDS):
            await self._replace()

    async def precede(self) -> None:
        """A checkpoint is to stand: what was noted is there, and the pools that a start found. Raises OSError."""
        if self._file is None and not self._noted.pools:
            return
        found = await asyncio.to_thread(self._found)
        if found is None or found != self._file:
            await self._replace()

    async def settle(self, changed: Sequence[Export] = (), *, stands: Remembered | None = None) -> None:
        """Return once what was changed before outlives the power. Raises UserError: it is made, and may not.

        changed: exports whose content, or size, was. The disk has one that cannot be read as it was, or not at all.
        """
        patience = asyncio.timeout(SETTLE_SECONDS)
        try:
            async with patience, self._turn:
                await self._note(stands)
        except OSError as error:  # a disk may say ETIMEDOUT itself, which is a TimeoutError too
            why = error.strerror or str(error)
            if patience.expired():
                why = f"the disk, or the first checkpoint, took longer than {SETTLE_SECONDS} s"
        else:
            self._require_told(changed)
            return
        when = "; `nbdzram doctor` tells when flushes are answered again" if self._journal is not None else ""
        raise UserError(
            f"it is done, and not on the disk of the checkpoints: {why}; if the power fails before a checkpoint "
            f"stands, it is undone{when}"
        )

    def _require_told(self, changed: Sequence[Export]) -> None:
        journal = self._journal
        lost = sorted(export.name for export in changed if journal is not None and journal.fails(export.disk))
        if lost:
            raise UserError(
                f"it is done, and not on the disk of the checkpoints: '{lost[0]}' cannot be read, so that has what was "
                "flushed before, and comes back if the power fails; the log names the block: write it anew"
            )

    @property
    def remembered(self) -> Remembered:
        """What a checkpoint that is taken now goes with."""
        return self._memory.changes

    async def follow(self, stands: Remembered | None) -> None:
        """A checkpoint stands: what a start or a reload changed is settled too."""
        if self._noted is not self._memory.changes or self._file is None:
            try:
                await self.settle(stands=stands)
            except UserError as error:
                log.warning("what was changed last: %s", error)

    async def finish(self) -> None:
        """Nothing is written behind this, into what is then another server's."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def _note(self, stands: Remembered | None = None) -> None:
        """Raises OSError. `stands`: what was remembered when the checkpoint was taken that stands now."""
        told = changes = self._memory.changes
        if self._journal is not None:
            await self._journal.synced()
        elif changes is not stands and changes.pools != self._noted.pools:
            told = replace(changes, pools=self._noted.pools)
        if told is not self._noted or self._file is None:
            await self._replace(told)

    async def _replace(self, changes: Remembered | None = None) -> None:
        """By these, or else by what was noted last; and pools. Raises OSError."""
        while self._writing is not None and not self._writing.done():
            await self.finish()  # what the one under way writes is older, and must not come last
        if not self._is_ours():
            raise OSError(errno.EBUSY, "another server has their directory")
        noted = changes or self._noted
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, noted, self._roomiest(noted)))
        self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())  # also if nobody waits
        await asyncio.shield(self._writing)

    def _roomiest(self, changes: Remembered) -> Remembered:
        """The same, with pools that are known ahead as they are now, where there is more room."""
        pools = dict(changes.pools)
        for name in self._ahead & self._memory.changes.pools.keys():
            now = self._memory.changes.pools[name]
            if name not in pools or is_roomier(now.mem_limit, pools[name].mem_limit):
                pools[name] = now
        return replace(changes, pools=pools)

    def _write(self, noted: Remembered, and_pools: Remembered) -> None:
        """On a thread."""
        note_in(self._directory, and_pools)
        is_whole = self._journal is not None or and_pools.pools == noted.pools  # or else it holds on
        self._noted, self._file = noted if is_whole else and_pools, self._found()

    def _found(self) -> FileId | None:
        """On a thread: which file a start would read."""
        return file_at(self._directory / FILE_NAME)


def is_roomier(limit: int, other: int) -> bool:
    """Whether more fits below the one limit than below the other; 0 is none."""
    return bool(other) and (not limit or limit > other)
