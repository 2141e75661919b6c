"""An administrator's act is answered as done when the disk of the checkpoints has it, or of it what a start must know.

    the act is made ── a group of the journal tells it ── changes.json is replaced ── it is answered

The journal tells what exports are. What it does not tell lies beside it, as a state directory would have it
(state.py): what was declared when something was changed, so that a start knows whether the change still holds; what was
removed and is declared; pools that were added or changed. Without a journal a checkpoint tells what exports hold, and
the file, which is newer, who may attach and what else was said of them. A checkpoint may bring back what was removed or
renamed since: the file keeps what was said of that disk last, whatever has its name now.

Invariants
1. What was answered is in both: the file is replaced behind the group that tells the act. One of them may know of an
   act alone that was not answered: the journal where the power fails between the two, the file where the act was
   remembered, and not made yet as the group's moment was taken. Then the journal says what exports are (restore.py).
2. It is written by one after the other, each with all that was changed before it, and by who has the directory.
3. Before a checkpoint stands it has all that was said: no checkpoint is newer, so that what the file says of exports is
   what was said last. It is written again if what was written is not there any more, as where another directory is at
   the path now (claim.py).
4. Of pools it is ahead: it knows one before an export may lie there, and more room before somebody may fill it, until
   the journal, or a checkpoint without one, has that there is less. A start needs all that it has to lie somewhere.
5. What a journal tells comes before it at a start. Where one of a server before is there still, and no server goes on
   with it, nothing is answered before a checkpoint has let it go. Nor where disks went under a server before: which of
   those that are there the checkpoint has by another name is not known any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nbdzram.errors import UserError
from nbdzram.server.exports import Export, Exports
from nbdzram.server.state import FILE_NAME, ExportRecord, FileId, Noted, PoolChange, Remembered, State, file_at
from nbdzram.server.syncs import Sync
from nbdzram.server.telling import Seen

SETTLE_SECONDS = 30
"""For an administrator, who can look again; the first checkpoint of a large server may take minutes."""

log = logging.getLogger("nbdzram.server")


class Settling:
    """Of one server. Used on the event loop."""

    def __init__(
        self,
        directory: Path,
        exports: Exports,
        journal: Sync | None,
        note: Callable[[Noted], None],
        asked: Callable[[], None] = lambda: None,
    ) -> None:
        """note: see Place.note. `asked` is called once somebody waits: for a first checkpoint, perhaps."""
        self._directory = directory
        self._exports = exports
        self._journal = journal
        self._write_down = note
        self._asked = asked
        self._memory = State(None)
        self._noted = Noted()  # last, or what the server began with
        self._began_with: Mapping[str, int] = {}  # limits of pools
        self._ahead: set[str] = set()  # pools that are known before all else that was changed is noted
        self._file: FileId | None = None  # which has that; None: another process wrote what is there, if anything
        self._stands = 0  # the number of the last checkpoint
        self._standing: dict[str, tuple[Export, int]] = {}  # what that has, and the sizes then
        self._went_before: dict[str, ExportRecord] = {}  # the same of disks that went under another process
        self._may_answer = asyncio.Event()  # nothing of another server comes before what is noted
        self._may_answer.set()
        self._writing: asyncio.Task[None] | None = None  # to its end, also when whoever began it waits no longer
        self._turn = asyncio.Lock()

    def begin(
        self, memory: State, noted: Noted, limits: Mapping[str, int], stands: int, *, came: bool, waits: bool
    ) -> None:
        """The server has started; `memory` is what it remembers, `noted` what was here then, `limits` those of its
        pools. `stands`: the number of the last checkpoint, or 0. `came`: its exports are what that brought, or else
        those of a process before. `waits`: a journal is here that a server before wrote, and nobody goes on with.

        What another process served may have other pools than the last checkpoint, and less exports.
        """
        self._memory = memory
        self._began_with = limits
        self._stands = stands
        if not came and noted.went_since == stands:
            self._went_before = noted.went
        if stands:
            there = [export for export in self._exports if export.name not in self._went_before]
            self._standing = {export.name: (export, export.disk.size_bytes) for export in there}
        if waits or self._went_before:
            self._may_answer.clear()
        pools = memory.changes.pools
        if self._journal is None:
            pools = {name: pool for name, pool in pools.items() if pool.declared is None} | noted.pools
        self._noted = self._with(memory.changes, pools)

    async def know_pool(self, name: str) -> None:
        """Return once a start has the pool, and as much room there as is remembered now. Raises OSError."""
        self._ahead.add(name)
        async with asyncio.timeout(SETTLE_SECONDS):
            await self._replace()

    async def precede(self) -> None:
        """A checkpoint is to stand: what was said is there, and the pools that a start found. Raises OSError."""
        found = await asyncio.to_thread(self._found)
        told = self._to_note(self._memory.changes, less_room=False)
        if found is None or found != self._file or told != self._noted:
            await self._replace(told)

    async def settle(self, changed: Sequence[Export] = (), *, stands: Remembered | None = None) -> None:
        """Return once what was changed before outlives the power. Raises UserError: it is made, and may not.

        changed: exports whose content, or size, was. The disk has one that cannot be read as it was, or not at all.
        """
        self._asked()
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
    def waits(self) -> bool:
        """For a checkpoint, before anybody is answered."""
        return not self._may_answer.is_set()

    @property
    def remembered(self) -> Remembered:
        """What a checkpoint that is taken now goes with."""
        return self._memory.changes

    async def follow(self, stands: Remembered | None, number: int, has: Iterable[Seen]) -> None:
        """A checkpoint stands, which `has` these: what a start or a reload changed is settled too. No journal of
        another server is there any more.
        """
        self._stands = number
        self._standing = {seen.name: (seen.export, seen.size_bytes) for seen in has}
        self._went_before = {}
        self._may_answer.set()
        if self._file is None or self._to_note(self._memory.changes, less_room=True) != self._noted:
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
        await self._may_answer.wait()
        changes = self._memory.changes
        if self._journal is not None:
            await self._journal.synced()
        told = self._to_note(changes, less_room=self._journal is not None or changes is stands)
        if told != self._noted or self._file is None:
            await self._replace(told)

    def _to_note(self, changes: Remembered, *, less_room: bool) -> Noted:
        """What a start is to know. less_room: also of pools that all of what they have now fits less."""
        return self._with(changes, changes.pools if less_room else self._as_roomy(changes.pools))

    def _with(self, changes: Remembered, pools: dict[str, PoolChange]) -> Noted:
        went = {} if self._journal is not None else self._went(changes)
        return Noted(
            exports=changes.exports,
            pools=pools,
            former=changes.former,
            kept_in=changes.kept_in,
            went=went,
            went_since=self._stands if went else 0,
        )

    def _as_roomy(self, pools: Mapping[str, PoolChange]) -> dict[str, PoolChange]:
        """The same, with all the room that there was, and with pools that were removed since."""
        known = {name: change.mem_limit for name, change in self._noted.pools.items()}
        rooms = {name: known.get(name, self._began_with.get(name, now.mem_limit)) for name, now in pools.items()}
        return dict(self._noted.pools) | {
            name: replace(now, mem_limit=rooms[name]) if is_roomier(rooms[name], now.mem_limit) else now
            for name, now in pools.items()
        }

    def _went(self, changes: Remembered) -> dict[str, ExportRecord]:
        """What was said last of disks that a checkpoint may bring back, though they were removed or renamed."""
        there = {export.name: export for export in self._exports}
        return self._went_before | {
            name: _record_of(export, size_bytes, changes.exports.get(name))
            for name, (export, size_bytes) in self._standing.items()
            if there.get(name) is not export
        }

    async def _replace(self, changes: Noted | None = None) -> None:
        """By these, or else by what was noted last; and pools. Raises OSError."""
        while self._writing is not None and not self._writing.done():
            await self.finish()  # what the one under way writes is older, and must not come last
        noted = changes or self._noted
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, noted, self._roomiest(noted)))
        self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())  # also if nobody waits
        await asyncio.shield(self._writing)

    def _roomiest(self, changes: Noted) -> Noted:
        """The same, with pools that are known ahead as they are now, where there is more room."""
        pools = dict(changes.pools)
        for name in self._ahead & self._memory.changes.pools.keys():
            now = self._memory.changes.pools[name]
            if name not in pools or is_roomier(now.mem_limit, pools[name].mem_limit):
                pools[name] = now
        return replace(changes, pools=pools)

    def _write(self, noted: Noted, and_pools: Noted) -> None:
        """On a thread."""
        self._write_down(and_pools)
        is_whole = self._journal is not None or and_pools.pools == noted.pools  # or else it holds on
        self._noted, self._file = noted if is_whole else and_pools, self._found()

    def _found(self) -> FileId | None:
        """On a thread: which file a start would read."""
        return file_at(self._directory / FILE_NAME)


def _record_of(went: Export, size_bytes: int, known: ExportRecord | None) -> ExportRecord:
    """Of a disk that is not there, or not by this name, of which `known` is remembered."""
    return ExportRecord(
        pool=went.pool_name,
        size_bytes=size_bytes,
        read_only=went.read_only,
        description=went.description,
        access=went.access,
        bounds=went.bounds,
        removed=True,
        declared=None if known is None else known.declared,
    )


def is_roomier(limit: int, other: int) -> bool:
    """Whether more fits below the one limit than below the other; 0 is none."""
    return bool(other) and (not limit or limit > other)
