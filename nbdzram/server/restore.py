"""What fills empty pools before anything is offered: a stream (`serve --restore`), or the newest checkpoint, and what
its journal holds beyond it.

Beside a journal the disks that came are kept as copies: a moment, by the names that the journal has for what they hold.
What clients change is told from there, so that nobody waits for a checkpoint before that (journal.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import BinaryIO

from nbdzram.config import ExportConfig
from nbdzram.engine import moment
from nbdzram.engine.compact import Compact
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, NoSuchExport, PoolFull, StreamError, UnknownFormat, UserError
from nbdzram.server.aside import set_aside, take_back
from nbdzram.server.chains import Checkpoint, chains, checkpoints_in
from nbdzram.server.inventory import effective
from nbdzram.server.moments import Kept, Moment, Reached
from nbdzram.server.received import as_declared, place_in, received_record, valid_name
from nbdzram.server.replay import Replay, apply_all, require_nothing_flushed
from nbdzram.server.source import open_source
from nbdzram.server.state import ExportRecord, Noted, State
from nbdzram.server.together import reveal_together
from nbdzram.stream.journal import Group
from nbdzram.stream.layout import ExportPart
from nbdzram.stream.receiving import Place, Received, Receiver
from nbdzram.units import counted, format_sizes

FITS_SHARE = 16
"""A pool may be over its limit by this part of it: what it held lies in other zspages than it lay."""

log = logging.getLogger("nbdzram.server")


@dataclass(frozen=True, slots=True)
class GoesOn:
    """A moment that the journal on the disk ends with, and what exports were then.

    `unneeded`: numbers of its files; `came`: those that groups came from, as Replay has them; `place`: where it lies,
    as Reached has it, if it was another process's.
    """

    moment: Moment
    unneeded: Sequence[int] = ()
    came: Sequence[tuple[Path, int]] = ()
    place: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a server's exports are of. moment_ns: 0 where no checkpoint is known; `goes_on`: None where one has to stand
    before FLUSH is answered.
    """

    moment_ns: int = 0
    goes_on: GoesOn | None = None


class Restore:
    """Into the pools of a server that starts. Its methods take long: not on an event loop."""

    def __init__(
        self,
        declared: Iterable[ExportConfig],
        pools: Mapping[str, Pool],
        state: State,
        noted: Noted | None = None,
        *,
        for_a_journal: bool = False,
        told_to_stop: Event | None = None,
    ) -> None:
        """`noted` beside the checkpoints: what was said of exports last, and what was declared then (settling.py).

        for_a_journal: one is to go on. told_to_stop: set by whoever ends the start; then nothing comes.
        """
        self._declared = {export.name: export for export in declared}
        self._pools = pools
        self._state = state
        self._noted = noted or Noted()
        self._remembered: Mapping[str, ExportRecord] = self._noted.exports
        self._for_a_journal = for_a_journal
        self._told_to_stop = told_to_stop or Event()
        self._reading: Path | None = None  # which stream came last
        self.outlived = self._why_nothing_comes() is not None
        """The pools have what a server before had in them, be it nothing: nothing comes."""

    def from_file(self, path: Path) -> None:
        """All that the stream in a file holds, or nothing; what is declared of its exports holds, not what it says,
        but that no declaration opens by its silence what it has closed.

        Pools that hold a disk already are left alone: a server that is started again has what it had. Raises UserError.
        """
        if not self._are_empty(path):
            return
        try:
            count, _ = self._receive([path])
        except UserError as error:
            raise type(error)(f"cannot restore {path}: {error}") from error
        log.info("%s restored from %s", counted(count, "export"), path)

    def from_newest(self, directory: Path) -> Begun | None:
        """The newest checkpoint that is whole, and what its journal holds. Raises UserError.

        None: there is none, or the pools hold disks. A damaged one is told, passed over and kept aside; where there are
        only such ones the server does not start, as it would begin with empty disks. Nor does it where a later version
        wrote the newest, or a journal is there alone.
        """
        known = checkpoints_in(directory)
        if not known:
            if not any(pool.disks() for pool in self._pools.values()):
                require_nothing_flushed(directory)
            self._remember_what_was_said()
            return None
        if not self._are_empty(directory):
            return None
        refused = ""
        passed_over: list[Checkpoint] = []
        unusable: set[Path] = set()
        for chain in chains(known):
            if unusable.intersection(one.path for one in chain):  # and not read up to there once more
                log.warning("the checkpoint %s cannot be used: it goes on from one that cannot", chain[-1].path)
                passed_over.extend(chain)
                continue
            try:
                count, begun = self._receive(_paths(chain), directory, chain[-1].number, newest=max(known))
            except UnknownFormat as error:
                raise UserError(
                    f"the checkpoint {chain[-1].path} is of a later version, of this or of Python: {error}; start "
                    "that, or move it away to begin from the one before"
                ) from error
            except StreamError as error:
                if isinstance(error.__cause__, EngineError):
                    raise  # it is right, and does not fit: an older one would not be what the exports are
                refused = str(error)  # not the error itself: it knows what came, which keeps its places as long
                log.warning("the checkpoint %s cannot be used: %s", chain[-1].path, refused)
                if not isinstance(error.__cause__, OSError):  # what its disk does not give it may give a moment later
                    unusable.add(self._reading or chain[-1].path)
                passed_over += chain
                continue
            set_aside(directory, passed_over)
            if not passed_over:
                take_back(chain)
            taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(begun.moment_ns / 1e9))
            told = counted(count, "export")
            log.info("%s restored from the checkpoint of %s, %s", told, taken, chain[-1].path.name)
            return begun
        raise UserError(
            f"no checkpoint in {directory} can be used: {refused}; repair them, or move them away, and a journal, to "
            "begin with empty disks"
        )

    def from_what_was_served(self, reached: Reached | None) -> Begun:
        """Nothing comes: the pools have what another process served."""
        if reached is None or not self._for_a_journal:
            return Begun()
        disks = [disk for pool in self._pools.values() for disk in pool.disks()]
        try:
            return Begun(goes_on=GoesOn(reached.moment(disks), place=reached.place))
        except (EngineError, UserError, MemoryError) as error:
            log.warning("the journal does not go on, so FLUSH waits for a whole checkpoint: %s", error)
            return Begun()

    def _lowered(self) -> set[str]:
        """The pools whose limit was set while a server ran: what they held was there, be it more."""
        known = self._state.changes.pools
        return {name for name, pool in self._pools.items() if name in known and known[name].mem_limit == pool.mem_limit}

    def _are_empty(self, source: Path) -> bool:
        why = self._why_nothing_comes()
        if why is not None:
            log.info("%s is not restored: %s", source, why)
        return why is None

    def _why_nothing_comes(self) -> str | None:
        """None: the pools are empty, and nobody emptied them."""
        holding = [name for name, pool in self._pools.items() if pool.disks()]
        if holding:
            return f"the pool {holding[0]} holds disks already"
        known = self._state.changes.exports.values()
        if known and all(record.removed for record in known):
            return "all exports were removed, as the pools tell that were found"
        return None

    def _receive(
        self, paths: Sequence[Path], journal_in: Path | None = None, number: int = 0, newest: int = 0
    ) -> tuple[int, Begun]:
        """A stream, and those that hold what changed since the one before: how many exports, and what came of it.

        journal_in: the directory with the journal that goes on behind them; `number` is that of the last, `newest` of
        the newest that is there: a later start may be able to read that one, and would miss what follows this.
        """
        disks, behind, count = _Arriving(self._pools), None, 0
        self._reading = None
        try:
            with _room_to_arrive(self._pools):
                for path in paths:
                    self._reading = path
                    with open_source(path, self._told_to_stop) as file:
                        disks.take_stream(file, all_exports=True)
                if journal_in is not None:
                    groups = Replay(journal_in, number, disks.moment_identity)
                    count = apply_all(self._until_told_to_stop(groups), disks.take_group)
                    if count:
                        log.info("%s of the journal behind the checkpoint", counted(count, "group"))
                    if self._for_a_journal and groups.is_whole and number == newest:
                        behind = groups
                received, goes_on = disks.under_their_names(behind)
            _require_fits(self._pools, self._lowered(), self._require_no_end)
        except OSError as error:
            disks.discard()
            refusal = StreamError if error.errno == errno.EIO else UserError  # what its disk lost is as if damaged
            raise refusal(f"cannot read {path}: {error.strerror}") from error
        except BaseException:
            disks.discard()
            raise
        if number <= self._noted.went_since:
            self._remembered = {**self._noted.exports, **self._noted.went}
        told = {one.name: received_record(one, None) for one in received}
        if not count:  # or else the journal told what was said last
            told = {name: self._as_said_last(name, record, anew=journal_in is None) for name, record in told.items()}
        records = {one.name: self._record(one, told[one.name], anew=journal_in is None) for one in received}
        if journal_in is not None:
            records = {**self._not_there(records, disks.went_by_groups()), **records}
        reveal_together([one.disk for one in received], records, self._state)
        return len(received), Begun(disks.moment_ns, goes_on)

    def _until_told_to_stop(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Raises UserError then: there may be tens of thousands."""
        for group in groups:
            self._require_no_end(f"reading {group.path}")
            yield group

    def _require_no_end(self, act: str) -> None:
        """Raises UserError: whoever ends the start does so in the middle of this."""
        if self._told_to_stop.is_set():
            raise UserError(f"{act} was interrupted; nothing of it is kept")

    def _remember_what_was_said(self) -> None:
        """No checkpoint stood yet when the power failed: what exports held is gone, and what was said of them holds for
        those that are made anew."""
        if (
            self._remembered
            and not self._state.changes.exports
            and not any(pool.disks() for pool in self._pools.values())
        ):
            self._state.remember_exports(self._not_there(()))

    def _not_there(self, there: Container[str], went: Container[str] = ()) -> dict[str, ExportRecord]:
        """What was said of other exports: that they are removed, or to whom one that is made anew is not to open.

        went: those that the journal had, and has no more; who removed one of them had no answer yet.
        """
        return {
            name: replace(
                record,
                removed=record.removed or (name in went and record.declared is not None),
                renamed_from=None,
                rolled_back_from=None,
            )
            for name, record in self._noted.exports.items()
            if name not in there
        }

    def _as_said_last(self, name: str, told: ExportRecord, *, anew: bool) -> ExportRecord:
        """What a checkpoint tells of an export, with what an administrator said of that behind it: no journal tells.

        anew: a stream does that somebody names, whose export may be another one of that name: it is not opened by that.
        """
        known = self._remembered.get(name)
        if known is None or known.pool != told.pool:  # the latter: of another disk of that name
            return told
        closed = as_declared(told, known) if anew else known
        return replace(
            told, read_only=closed.read_only, description=known.description, access=closed.access, bounds=known.bounds
        )

    def _record(self, received: Received, then: ExportRecord, *, anew: bool) -> ExportRecord:
        """What was changed at run time holds where it is remembered what was declared then, and that still is; where
        that is not known, or the stream is another than what was served, no declaration that says nothing opens what
        was closed."""
        config = self._declared.get(received.name)
        if config is None:
            return then
        known = self._remembered.get(received.name)
        said = known if anew or known is None else replace(then, declared=known.declared)
        record = replace(effective(config, said), removed=False)
        if anew or known is None:
            closed = as_declared(then, record)
            record = replace(record, access=closed.access, read_only=closed.read_only)
        differs = [
            what
            for what, was, is_now in (
                ("who may attach", then.access, record.access),
                ("whether clients may write", then.read_only, record.read_only),
                ("what it may take", then.bounds, record.bounds),
            )
            if was != is_now
        ]
        if differs:
            log.warning(
                "of the export '%s' holds as declared, and not as it was: %s", received.name, ", ".join(differs)
            )
        size_bytes = max(received.disk.size_bytes, record.size_bytes)
        return replace(record, pool=received.place.name, size_bytes=size_bytes)


def _paths(chain: Sequence[Checkpoint]) -> list[Path]:
    """Raises StreamError: the one from which it goes on is not there."""
    first = chain[0]
    if first.since is not None:
        raise StreamError(f"{first.path.name} goes on from the checkpoint {first.since:08d}, which is missing")
    return [one.path for one in chain]


@contextlib.contextmanager
def _room_to_arrive(pools: Mapping[str, Pool]) -> Iterator[None]:
    """While it comes no limit holds. There is more than there was: what changed beside what it replaces, and eight
    bytes for each object; a pool that was full would not be filled again. And there is what a chain began with: it went
    before a pool's limit was lowered, or the pool was made anew. All of it was in memory once.
    """
    limits = {pool: pool.mem_limit for pool in pools.values()}
    try:
        for pool in limits:
            pool.mem_limit = 0
        yield
    finally:
        for pool, limit in limits.items():
            pool.mem_limit = limit


def _require_fits(pools: Mapping[str, Pool], lowered: Container[str], require_no_end: Callable[[str], None]) -> None:
    """Raises UserError: what came is not what a pool with this limit can have had, unless that was `lowered` since."""
    for name, pool in pools.items():
        limit = pool.mem_limit
        if not limit or pool.stats().memory_used <= limit:
            continue
        compaction = Compact(pool)
        while compaction.step():
            require_no_end(f"making what came fit the pool '{name}'")
        used = pool.stats().memory_used
        takes, allowed = format_sizes(used, limit)
        if used > limit + limit // FITS_SHARE and name not in lowered:
            raise UserError(
                f"what was stored does not fit the pool '{name}': it would take {takes}, and mem_limit is "
                f"{allowed}; raise the limit, or restore it where there is more room"
            )
        if used > limit:
            log.warning(
                "the pool '%s' takes %s, and mem_limit is %s: it was full, or that was lowered; writes find no room "
                "until something is trimmed or removed, or the limit is raised",
                *(name, takes, allowed),
            )


class _Arriving:
    """Concealed disks, as the streams that came so far say that they are.

    Of as many as a pool may have with checkpoints two fit, and not three: what one stream had goes, and nobody knows it
    any more, before the next one comes.

    What lay in a pool that is not there any more comes into one that is none of the server's: it may be gone in what
    comes later, as whoever removed its exports, and it, was answered.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self.moment_ns = 0
        self.moment_identity = b""
        self._pools = dict(pools)
        self._gone: dict[str, Pool] = {}  # those of these that are none of the server's
        self._token = os.urandom(8).hex()
        self._numbers = itertools.count()
        self._received: dict[tuple[str, str], Received] = {}  # by pool and name
        self._before_groups: set[str] = set()  # names that were there as one came, or before all
        self._kept: dict[Disk, Kept] = {}  # copies, for a journal that goes on
        self._bases: dict[str, dict[int, dict[str, Disk]]] = {}  # while one comes, by pool, identity and name

    def take_stream(self, file: BinaryIO, *, all_exports: bool, salt: int = 0, alone: bool = True) -> None:
        """all_exports: those that it does not tell are gone. Raises UserError; then nothing is changed."""
        receiver = Receiver(self._place, self._name)
        try:
            arrived = receiver.receive(file.read, salt=salt, alone=alone)
        except StreamError as error:
            if isinstance(error.__cause__, PoolFull):
                more = "no mem_limit holds while this comes: memory ends, or what addresses a pool has for its limit"
                raise StreamError(f"{error} ({more})") from error.__cause__
            raise
        fresh = {(one.place.name, valid_name("", one.part)): one for one in arrived}
        gone = [one for key, one in self._received.items() if all_exports or key in fresh]
        self._received = fresh if all_exports else {**self._received, **fresh}
        self._bases.clear()
        moment.discard([one.disk for one in gone])
        assert receiver.header is not None
        self.moment_ns, self.moment_identity = receiver.header.moment_ns, receiver.header.identity

    def take_group(self, group: Group) -> None:
        """The same, of a group that is whole."""
        self._before_groups.update(name for _, name in self._received)
        with group.open() as file:
            self.take_stream(file, all_exports=group.head.all_exports, salt=group.salt, alone=False)

    def went_by_groups(self) -> set[str]:
        """The names that a group took."""
        return self._before_groups - {name for _, name in self._received}

    def under_their_names(self, behind: Replay | None) -> tuple[list[Received], GoesOn | None]:
        """All of them; nothing more comes. Raises UserError. A journal goes on `behind` that, or none does."""
        for pool, name in self._received:
            if pool in self._gone:
                raise NoSuchExport(f"the export '{name}' lay in the pool '{pool}', and no such pool is declared")
        self._close_gone()
        for key, one in list(self._received.items()):
            (disk,) = moment.snapshot_together([one.disk], [key[1]], read_only=one.part.read_only)
            self._received[key] = replace(one, name=key[1], disk=disk)
            disk.identify(one.disk.identity)
            if behind is None:
                moment.discard([one.disk])
            else:
                self._kept[disk] = Kept(one.disk, one.part.identity)
        received = list(self._received.values())
        if behind is None:
            return received, None
        return received, GoesOn(
            Moment((), self._kept, self.moment_identity, self.moment_ns, is_ours=False),
            behind.without_groups,
            behind.came,
        )

    def discard(self) -> None:
        """Nothing of it stays."""
        moment.discard([one.disk for one in self._received.values()])
        moment.discard([one.copy for one in self._kept.values()])
        for known in (self._received, self._kept, self._bases):
            known.clear()  # what is discarded has its place as long as it is known, and another chain may come
        self._close_gone()

    def _close_gone(self) -> None:
        while self._gone:
            self._gone.popitem()[1].close()

    def _name(self, part: ExportPart) -> str:
        valid_name("", part)
        return f"\n{self._token} {next(self._numbers)}"

    def _place(self, name: str) -> Place:
        if name not in self._pools:
            self._pools[name] = self._gone[name] = Pool()  # without a limit: all of it was in memory once
        bases = self._bases.setdefault(name, {})
        for one in self._received.values():
            if one.place.name == name:
                bases.setdefault(one.part.identity, {})[one.part.name] = one.disk

        def find_base(part: ExportPart) -> Disk | None:
            """What was sent and received here has one identity in several disks: in other pools, and in other folding
            domains, of which only the name tells. It is asked for as long as one comes, and known longer."""
            alike = self._bases.get(name, {}).get(part.origin_number, {})
            return alike.get(part.origin_name, next(iter(alike.values()), None))

        return replace(place_in(name, self._pools[name]), find_base=find_base)
