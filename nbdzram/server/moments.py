"""Moments: what a server's exports are at one point, as concealed copies, each told from the one before.

    Moment    roster: each export, and what is told of it beside its blocks
              kept: for each disk a copy, which moments share for as long as the disk's content stays what it is

Who takes one (a checkpoint, a group of the journal) holds it until the next, and tells what differs: what did not
change has the same copy. So a moment costs a look at each root, and a copy for each disk that was written since.

Invariants
1. All exports of a moment are as they were at one point. One that is being reset may be so in part, as when a client
   trims it. One whose blocks are not what was written is as it was at the moment before (write_readable), or is none of
   it where that did not have it; `behind` names it. Its last good copy does not give way, and is told on and on.
2. What is told of an export held while the copies were taken: the roster is read before and after, and where it differs
   the moment is taken again. So a copy never has another size than its content had.
3. A copy is deleted when the last moment that has it is released.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, TypeVar

from nbdzram.engine import moment, walk
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, UnreadableExport
from nbdzram.server.exports import Export, Exports
from nbdzram.server.telling import Base, Seen, Told, tell

CHANGING_SECONDS = 0.01
TRIES = 1000
"""For a moment beside a change, which takes milliseconds, and seconds where a large disk is removed."""

Outcome = TypeVar("Outcome")

log = logging.getLogger("nbdzram.server")


@dataclass(slots=True)
class Kept:
    """A copy, the name of its content, and how many moments have it."""

    copy: Disk
    identity: int
    holders: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """`identity` names it, to whoever reads what was told of it. One whose copies gave way lacks these. `behind`: disks
    that are not in it as they were then, and from which block on they could not be read. `is_ours`: not told by another
    process, of which nobody knows what it told of exports beside their blocks: who knows of that one alone is told all
    of this.
    """

    roster: tuple[Seen, ...]
    kept: Mapping[Disk, Kept]
    identity: bytes = field(default_factory=lambda: os.urandom(16))
    taken_ns: int = field(default_factory=time.time_ns)
    behind: Mapping[Disk, int] = field(default_factory=dict)
    is_ours: bool = True

    def bases(self, of: Collection[Disk] | None = None) -> dict[Disk, Base]:
        """What somebody has who was told of it, and is still known here; `of` these disks alone."""
        wanted = self.kept if of is None else self.kept.keys() & of
        kept = [(seen, self.kept[seen.disk]) for seen in self.roster if seen.disk in wanted]
        return {seen.disk: Base(seen.name, one.identity, one.copy) for seen, one in kept}

    def names_behind(self) -> list[str]:
        """Of the exports that are not in it as they were then."""
        return sorted(disk.name for disk in self.behind)

    def disk_of(self, export: Export) -> Disk | None:
        """Which it had then; None: it was none, and whoever was told of this has nothing of it."""
        return next((seen.disk for seen in self.roster if seen.export is export), None)

    def has_told(self, roster: Sequence[Seen]) -> bool:
        """Whoever was told of it knows all this."""
        return self.is_ours and self.roster == roster

    def told_since(self, since: Moment | None, *, changed_alone: bool = False) -> Told:
        """What is to be said of it to whoever has `since`; changed_alone: of exports whose blocks may differ. Looks at
        tables: on a thread.
        """
        kept = since.kept if since is not None else {}
        told = [seen for seen in self.roster if not changed_alone or kept.get(seen.disk) is not self.kept[seen.disk]]
        bases = since.bases({seen.disk for seen in told}) if since is not None else {}
        others = [] if since is None or len(bases) == len(told) else list(since.bases().values())
        return tell(
            told,
            {seen.disk: self.kept[seen.disk].copy for seen in told},
            bases,
            {seen.disk: self.kept[seen.disk].identity for seen in told},
            also_there=others,
        )


@dataclass(frozen=True, slots=True)
class Reached:
    """The moment that a journal on the disk ends with, of which the exports are: told to a process that goes on."""

    identity: str  # as hexadecimal digits
    taken_ns: int
    contents: dict[str, int]  # by the names of exports: of what they hold
    place: tuple[int, ...]  # the directory, and the number of the next file there

    @classmethod
    def of(cls, reached: Moment, place: tuple[int, ...]) -> Self:
        """To be told."""
        contents = {seen.name: reached.kept[seen.disk].identity for seen in reached.roster}
        return cls(reached.identity.hex(), reached.taken_ns, contents, place)

    def moment(self, disks: Sequence[Disk]) -> Moment:
        """With copies of these disks, which nobody has changed since. Raises EngineError, UserError."""
        known = [disk for disk in disks if disk.name in self.contents]
        copies = moment.snapshot_together(known, _names(len(known)))
        kept = {disk: Kept(copy, self.contents[disk.name]) for disk, copy in zip(known, copies, strict=True)}
        return Moment((), kept, bytes.fromhex(self.identity), self.taken_ns, is_ours=False)


class Moments:
    """Those of one server. Used on the event loop; `thread` does what takes long, and ends when they do."""

    def __init__(self, exports: Exports, thread_name: str) -> None:
        self._exports = exports
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=thread_name)
        self._damaged: set[str] = set()  # exports of which that was told; used on the thread

    def close(self) -> None:
        """Nothing is under way any more."""
        self._thread.shutdown()

    async def take(self, last: Moment | None) -> Moment:
        """What all exports are now; `last` itself, held once more, if nothing changed.

        Raises UserError, EngineError.
        """
        for _ in range(TRIES):
            roster = self._roster()
            try:
                taken = await self.on_the_thread(partial(self._copy_and_tell, roster, last))
            except EngineError:
                if self._roster() == roster and all(export.changing is None for export in self._exports):
                    raise
                await asyncio.sleep(CHANGING_SECONDS)  # one of them is being removed, or rolled back
                continue
            if self._roster() == roster:
                return _joined(roster, taken, last)
            await self.on_the_thread(partial(moment.discard, [kept.copy for kept in taken.values()]))
        raise EngineError("exports are changed all the time; no moment could be taken")

    async def release(self, *moments: Moment | None) -> None:
        """They are not needed any more."""
        freed = [kept for one in moments if one is not None for kept in _let_go(one)]
        if freed:
            await self.on_the_thread(partial(moment.discard, [kept.copy for kept in freed]))

    async def without(self, held: Moment, pools: Collection[Pool]) -> Moment | None:
        """In its place the same, but for its copies in these pools; None: there are no others."""
        left = {disk: one for disk, one in held.kept.items() if one.copy.pool not in pools or disk in held.behind}
        for one in left.values():
            one.holders += 1
        await self.release(held)
        return replace(held, kept=left) if left else None

    async def write_readable(
        self, taken: Moment, write: Callable[[Moment], Awaitable[Outcome]], last: Callable[[], Moment | None]
    ) -> tuple[Moment, Outcome]:
        """What `write` makes of the moment, less what cannot be read, and that moment. Behind an error it is let go.

        last: what exports that cannot be read are told as; asked each time, as it may change while a file is written.
        """
        known = last()
        if known is not None and known.behind:
            taken = await self._still_held_back(taken, known)
        while True:
            try:
                return taken, await write(taken)
            except UnreadableExport as error:
                held = await self._held_back(taken, last(), error)
                if held is None:
                    await self.release(taken)
                    raise
                taken = held
            except BaseException:
                await self.release(taken)
                raise

    async def _still_held_back(self, taken: Moment, last: Moment) -> Moment:
        """Less what could not be read in `last`, and cannot yet: each time all before it would be written in vain."""
        ill = await self.on_the_thread(lambda: [seen for seen in taken.roster if _is_unreadable(seen, taken, last)])
        for seen in ill:
            held = _without_changes(taken, seen, last.kept.get(seen.disk), {seen.disk: last.behind[seen.disk]})
            await self.release(taken)
            taken = held
        return taken

    async def _held_back(self, taken: Moment, last: Moment | None, error: UnreadableExport) -> Moment | None:
        """In place of `taken` the same, but for an export that cannot be read: that is as `last` has it, or none of it
        where it was removed meanwhile, with its pool. None: nobody knows what it was, and `taken` is still held.
        """
        (seen,) = [one for one in taken.roster if one.name == error.name]
        if all(export is not seen.export for export in self._exports):
            held = _without_changes(taken, seen, None, {})
            await self.release(taken)
            return held
        if last is None:
            return None
        disk = last.disk_of(seen.export)
        known = None if disk is None else last.kept.get(disk)
        if known is taken.kept[seen.disk] or (known is None and disk is not None):
            return None
        held = _without_changes(taken, seen, known, {seen.disk: error.block})
        if seen.disk not in last.behind:
            log.error("%s; it is kept as it was, and its FLUSH fails until the block is written anew", error)
        await self.release(taken)
        return held

    def hold(self, held: Moment) -> Moment:
        """Once more."""
        return _held(held)

    def adopted(self, told: Moment) -> Moment:
        """The same, of what another process told: its exports are those that are here now, and nobody changed them."""
        return replace(told, roster=tuple([seen for seen in self._roster() if seen.disk in told.kept]))

    async def on_the_thread(self, work: Callable[[], Outcome]) -> Outcome:
        """One after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _roster(self) -> tuple[Seen, ...]:
        return tuple([Seen.of(export) for export in self._exports])

    def _copy_and_tell(self, roster: Sequence[Seen], last: Moment | None) -> dict[Disk, Kept]:
        """On the thread: copies, and once of each export whose entry is damaged that it is: its copies are right, and
        the pool is not opened again.
        """
        taken = _copy_changed(roster, last)
        for disk in taken:
            if disk.damaged and disk.name not in self._damaged:
                self._damaged.add(disk.name)
                log.error(
                    "the entry of the export '%s' in the export directory is not what was written: memory may be "
                    "failing. What it holds is right, and is kept as ever, but a server that is started with this pool "
                    "refuses it; clone the export, remove it, and let the clone have its name",
                    disk.name,
                )
        return taken


def _copy_changed(roster: Sequence[Seen], last: Moment | None) -> dict[Disk, Kept]:
    """On the thread: copies of the disks that are not what `last` has of them; of one point."""
    earlier = [_copy_of(seen, last) for seen in roster]
    copies = moment.snapshot_changed([seen.disk for seen in roster], earlier, _names(len(roster)))
    return {
        seen.disk: Kept(copy, seen.identity or moment.new_identity())
        for seen, copy in zip(roster, copies, strict=True)
        if copy is not None
    }


def _names(count: int) -> list[str]:
    token = os.urandom(8).hex()
    return [f"\n{token} {number}" for number in range(count)]


def _copy_of(seen: Seen, last: Moment | None) -> Disk | None:
    """The copy that will do if no block of the disk changed; None: there is none, or it has another size or name."""
    kept = last.kept.get(seen.disk) if last is not None else None
    if kept is None or kept.copy.size_bytes != seen.size_bytes or seen.identity not in (0, kept.identity):
        return None
    return kept.copy


def _joined(roster: tuple[Seen, ...], taken: Mapping[Disk, Kept], last: Moment | None) -> Moment:
    """The moment of what was taken, and of what did not change since the last."""
    if last is not None and not taken and not last.behind and last.has_told(roster):
        return _held(last)
    known = last.kept if last is not None else {}
    shared = {seen.disk: known[seen.disk] for seen in roster if seen.disk not in taken}
    for one in shared.values():
        one.holders += 1
    return Moment(roster, {**shared, **taken})


def _is_unreadable(seen: Seen, taken: Moment, last: Moment) -> bool:
    """On the thread: a look at where it could not be read. False: nobody knows."""
    block, known = last.behind.get(seen.disk), last.kept.get(seen.disk)
    if block is None or known is taken.kept[seen.disk]:
        return False
    try:
        walk.Walk(taken.kept[seen.disk].copy, None if known is None else known.copy, walk.Told(), block).step()
    except EngineError:
        return True
    except MemoryError:  # whoever writes all of it says so
        pass
    return False


def _without_changes(taken: Moment, seen: Seen, known: Kept | None, behind: Mapping[Disk, int]) -> Moment:
    """With `known` for one of its exports, held; None: without it."""
    kept = {disk: one for disk, one in taken.kept.items() if disk is not seen.disk}
    if known is not None:
        kept[seen.disk] = known
    for one in kept.values():
        one.holders += 1
    roster = tuple([one for one in taken.roster if one.disk in kept])
    return replace(taken, roster=roster, kept=kept, behind={**taken.behind, **behind})


def _held(held: Moment) -> Moment:
    for one in held.kept.values():
        one.holders += 1
    return held


def _let_go(held: Moment) -> Iterable[Kept]:
    for kept in held.kept.values():
        kept.holders -= 1
        if not kept.holders:
            yield kept
