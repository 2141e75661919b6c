"""Checkpoints: all exports of a moment, again and again, as streams in a directory.

    00000001-full.stream   00000002-since-00000001.stream   00000003-since-00000002.stream   ...   00000018-full.stream

The first of a chain is whole; each other one holds what changed since the one before, told by comparing the copies of
two moments. A chain that has grown long, or larger than a whole one, ends, and another begins. What is older than the
chains to keep goes when the next whole one is durable.

A file is written beside its place, synced, renamed, and the directory synced: what has its name is whole, whatever the
power does. Files are read again by restore.py.

Between two checkpoints the copies of the last one keep what clients overwrite. They give way: when a write finds no
room those in its pool are dropped, and the next checkpoint tells the exports there whole. One that is being written is
given up then, and the next one is not: beside clients that write to a full pool there would be none any more.

A whole one meets every block, and needs room beside those that are there. Where a block is not what was written, or
there is no such room, the chain goes on in its place, of which only what changes is read and written: what one bit
costs is its block.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from nbdzram import __version__
from nbdzram.config import CheckpointConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, StreamError, UnreadableExport, UserError, reason_of
from nbdzram.machine import Machine
from nbdzram.server.aside import beyond, count_aside, forget_aside
from nbdzram.server.chains import (
    FIRST,
    Checkpoint,
    checkpoints_in,
    name_of,
    next_number,
    segments_in,
    sync_directory,
    unfinished_in,
)
from nbdzram.server.exports import Exports
from nbdzram.server.journal import Journal
from nbdzram.server.moments import Moment, Moments, Reached
from nbdzram.server.place import Place, is_same
from nbdzram.server.pools import PoolService
from nbdzram.server.restore import Begun
from nbdzram.server.segments import forget_journal
from nbdzram.server.settling import Settling
from nbdzram.server.state import Noted, Remembered, State
from nbdzram.server.steadily import Step, end_all, steadily
from nbdzram.status import CheckpointStatus
from nbdzram.stream.reading import identity_of
from nbdzram.stream.sending import Progress, send
from nbdzram.units import format_size

LONGEST_CHAIN = 64
"""Streams that a start has to read; at one a minute about an hour."""
LOOK_SECONDS = 1.0
AGAIN_SECONDS = 5.0
"""After a checkpoint that the journal waited for: another one, where that failed, or the journal is long again."""
WRITE_AT_ONCE_BYTES = 1 << 20
MOST_EXPORTS = 1024
"""Of a pool whose exports all change between two flushes: itself, and the copies of three moments, in 4,096 places."""
MOST_COPIED = 2048
"""Of a pool that has checkpoints at all: itself, and the copies of the one that is written."""

log = logging.getLogger("nbdzram.server")


class Checkpoints:
    """Of one server. start(), then stop() when all clients have their answers: it takes the last one."""

    def __init__(
        self, config: CheckpointConfig, exports: Exports, pools: Mapping[str, PoolService], durable: Sequence[str] = ()
    ) -> None:
        """`durable`: the pools whose FLUSH waits for a journal beside the checkpoints."""
        self._config = config
        self._exports = exports
        self._pools = pools
        self._moments = Moments(exports, "checkpoint")
        self._last: Moment | None = None  # what the next one tells its changes from
        self._chain: list[Checkpoint] = []
        self._chain_identities: list[bytes] = []  # of their moments
        self._chain_bytes: list[int] = []
        self._found = 0  # the number of the newest checkpoint in the directory
        self._found_journal = False  # one that a start would read, and of which this server knows nothing
        self._beside_state = False  # the directory is a state directory too, which has a changes.json of its own
        self._task: asyncio.Task[None] | None = None
        self._serves = asyncio.Event()  # until then all that is served may be another process's, or nobody's
        self._turn = asyncio.Lock()  # one checkpoint after another, and nobody drops copies meanwhile
        self._crowded: set[str] = set()  # pools that were told to have too many exports for a journal
        self._overfull: set[str] = set()  # those that were told to have too many for a checkpoint
        self._gave_way = False  # the last one did; used on the thread, one after another
        self._goes_on_to = 0  # how long a chain may be before a whole one is tried again, after one that met rot
        self._status: CheckpointStatus | None = None
        self._writing: Progress | None = None  # of the one under way
        self._damaged_files = 0  # that lie in the directory
        self._journal_moments = Moments(exports, "journal")
        self.journal: Journal | None = None
        """What FLUSH of the durable pools waits for."""
        self.reached: Reached | None = None
        self.place = Place(config.directory)
        self.settling: Settling | None = None
        """What the answer to an administrator waits for; None where a state directory remembers, in the same place."""
        if config.directory is not None:
            if durable:
                self.journal = Journal(config.directory, self._journal_moments, durable)
            self.settling = Settling(config.directory, exports, self.journal, self.place.note, self.begin_to_serve)

    @property
    def _directory(self) -> Path:
        assert self._config.directory is not None
        return self._config.directory

    @property
    def status(self) -> CheckpointStatus | None:
        """Of the newest that is whole; None: no directory is named."""
        if self._status is None:
            return None
        share = None if self._writing is None else self._writing.share
        return replace(self._status, written_share=share, damaged_files=self._damaged_files)

    def prepare(self, state_dir: Path | None) -> None:
        """Make the directory usable. Raises UserError."""
        if self._config.directory is None:
            return
        self._beside_state = is_same(state_dir, self._directory)
        if self._beside_state and self.journal is None:
            self.settling = None
        if self.journal is not None and state_dir is not None and not Machine().keeps_in_memory(state_dir):
            raise UserError(
                f'durability = "flush": the state directory {state_dir} lies on a disk, where a power failure leaves '
                "pools of which nobody knows whether they are whole, and the journal would not be read; put it on a "
                "tmpfs, or leave it out"
            )
        if self.journal is not None and self._beside_state:
            raise UserError(
                f'durability = "flush": {self._directory} is the state directory too, and each keeps a changes.json of '
                "its own there; name another for the checkpoints"
            )
        try:
            self.place.prepare()
            known = checkpoints_in(self._directory)
            self._found = max(known, default=0)
            if self.journal is None:
                self._found_journal = max(segments_in(self._directory), default=-1) >= self._found
            for left in unfinished_in(self._directory):
                left.unlink()
            sync_directory(self._directory)
            if self.journal is not None and Machine().keeps_in_memory(self._directory):
                log.warning(
                    'durability = "flush": %s lies in memory, so what is flushed there ends with the power; name a '
                    "directory on a disk",
                    self._directory,
                )
        except OSError as error:
            raise UserError(
                f"cannot keep checkpoints in {self._directory}: {error.strerror}; name a directory that this user may "
                "write"
            ) from error

    async def go_on_from(self, begun: Begun) -> None:
        """The exports are those, and nobody may change them yet."""
        if self._config.directory is not None:
            with contextlib.suppress(UserError):  # whoever takes a checkpoint says so
                self._damaged_files = await asyncio.to_thread(count_aside, self._directory)
        if self.journal is None or begun.goes_on is None:
            return
        try:
            if not self.place.may_be_ours:
                raise OSError(errno.EBUSY, "another server, or other disks, have that directory")
            if begun.moment_ns:
                await asyncio.to_thread(self.place.take_possession)
        except OSError as error:
            log.warning("the journal in %s does not go on: %s", self._directory, error.strerror)
            await self._journal_moments.release(begun.goes_on.moment)
        else:
            await self.journal.go_on_from(begun.goes_on)

    def start(self, begun: Begun, memory: State, noted: Noted) -> None:
        """`begun`: what the server began from; memory, noted: see Settling.begin."""
        if self._config.directory is None:
            return
        if self.settling is not None:
            limits = {name: service.pool.mem_limit for name, service in self._pools.items()}
            came = bool(begun.moment_ns)
            self.settling.begin(memory, noted, limits, self._found, came=came, waits=self._found_journal)
        self._status = CheckpointStatus(
            moment=begun.moment_ns / 1e9 if begun.moment_ns else None,
            interval_seconds=self._config.interval_seconds,
            seconds=0.0,
            stream_bytes=0,
            failures=0,
        )
        if self.journal is not None and not self.journal.status.usable:
            log.info("FLUSH waits for a whole checkpoint in %s; `nbdzram doctor` says how far it is", self._directory)
        self._task = asyncio.create_task(self._beat())

    def _tell_crowds(self) -> None:
        """Of each pool once, and once more where it has too many for any checkpoint."""
        most = MOST_COPIED if self.journal is None else MOST_EXPORTS
        if len(self._exports) <= most:
            return
        for name, count in Counter([export.pool_name for export in self._exports]).items():
            if count > MOST_COPIED and name not in self._overfull:
                self._overfull.add(name)
                log.error(
                    "the pool '%s' has %d exports; of more than %d no checkpoint has places for its copies, so none "
                    "stands any more, of no pool: let some lie in another pool",
                    *(name, count, MOST_COPIED),
                )
            elif most < count <= MOST_COPIED and name not in self._crowded:
                self._crowded.add(name)
                log.warning(
                    "the pool '%s' has %d exports; where FLUSH waits for a journal more than %d are too many for its "
                    "places, and FLUSH fails when most of them changed: let some lie in another pool",
                    *(name, count, MOST_EXPORTS),
                )

    async def finish(self) -> None:
        """Begin none any more, and wait for the one under way. The journal has what was written so far: whoever waits
        for the rest, as clients do in a takeover, does not wait for that.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            async with self._turn:
                pass
            with steadily("the journal's last group"):  # or no last checkpoint would be taken
                await self._sync_journal()

    async def stop(self, *, last: bool = True) -> None:
        """Take the last one, of what clients were answered; not where another process goes on with the pools: then
        `reached` is where the journal ends, if it goes on as well.
        """
        if self._task is None:
            return
        await self.finish()
        if last:
            await self.take()
        elif self.journal is not None:
            with steadily("the journal that another process is to go on with"):
                self.reached = await self.journal.reached()
        await self._end()

    async def give_up(self) -> None:
        """Of a start that failed: the pools are open, and nobody serves them. No last one is taken: with each such
        start an older one would go, and the clients of another process that goes on wait for it.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._end()

    async def _end(self) -> None:
        """Nothing is written any more, and the directory is free for others, whatever is met on the way there."""
        steps: list[Step] = [("the end of the last checkpoint's copies", self._drop_in_turn)]
        if self._task is not None and self.settling is not None:
            steps.append(("the end of what is noted beside checkpoints", self.settling.finish))
        if self.journal is not None:
            steps.append(("the end of the journal", self.journal.close))
        await end_all(steps)
        self._moments.close()
        self._journal_moments.close()
        self.place.release()

    def begin_to_serve(self) -> None:
        """Clients are let in, or an administrator waits for what he changed while images are loaded, and nobody else
        goes on with the exports: what they are is written from now on.
        """
        self._serves.set()

    def require_flushes_answered(self) -> None:
        """Raises UserError: behind a takeover they would be not, or whoever waits for one would be hung up on."""
        if self.journal is None:
            return
        self.journal.require_answers()
        self.journal.require_readable()
        if not self.journal.has_begun and self._status is not None and self._status.failures:
            raise UserError(
                "its FLUSH waits for a first checkpoint, which failed, and who waits cannot be handed over; `nbdzram "
                "doctor` says why, and once one stands ask again"
            )

    async def _beat(self) -> None:
        await self._serves.wait()
        loop = asyncio.get_running_loop()
        refused, hurries_from = self._refused(), loop.time()
        due = loop.time() + self._config.interval_seconds * (self.journal is None)  # what came before can go then
        while True:
            with steadily("the count of exports"):
                self._tell_crowds()
            hurries = self._is_waited_for()
            next_at = min(due, hurries_from) if hurries else due
            await asyncio.sleep(min(LOOK_SECONDS, max(next_at - loop.time(), 0.0)))
            with steadily("giving way to writes that find no room"):
                full = self._full_since(refused)
                if full:
                    refused = self._refused()
                    await asyncio.shield(asyncio.create_task(self._give_way(full)))
            if loop.time() >= next_at:
                due = loop.time() + self._config.interval_seconds
                await asyncio.shield(asyncio.create_task(self.take()))
                hurries_from = loop.time() + AGAIN_SECONDS

    def _is_waited_for(self) -> bool:
        journal, settling = self.journal, self.settling
        return (journal is not None and journal.wants_checkpoint) or (settling is not None and settling.waits)

    def _refused(self) -> dict[Pool, int]:
        """On the loop, or on the thread: pools may come and go meanwhile."""
        return {service.pool: service.pool.failed_writes for service in tuple(self._pools.values())}

    def _full_since(self, refused: Mapping[Pool, int]) -> set[Pool]:
        """Those in which more writes have found no room; the same."""
        return {pool for pool, count in self._refused().items() if count > refused.get(pool, 0)}

    async def _give_way(self, full: Collection[Pool]) -> None:
        """The copies of the last one in these pools go, and the next one tells what is there whole; those of the
        journal's last group are made anew.
        """
        async with self._turn:
            if self._last is not None:
                self._last = await self._moments.without(self._last, full)
        if self.journal is not None:
            await self.journal.give_way(full)
        await self._sync_journal()

    async def _sync_journal(self) -> None:
        if self.journal is not None and self.journal.status.usable:  # or else it waits for the next checkpoint itself
            with contextlib.suppress(OSError):
                await self.journal.synced()

    async def _drop_in_turn(self) -> None:
        async with self._turn:
            await self._drop()

    async def _drop(self) -> None:
        last, self._last = self._last, None
        await self._moments.release(last)

    async def take(self) -> None:
        """One, now. A failure is counted and told."""
        async with self._turn:
            assert self._status is not None
            try:
                try:
                    await self._take()
                finally:
                    self._writing = None
            except (UserError, EngineError, OSError, MemoryError) as error:
                self._status = replace(self._status, failures=self._status.failures + 1)
                log.warning("a checkpoint failed: %s", await self._moments.on_the_thread(partial(self._why, error)))
                if self.journal is not None and isinstance(error, UnreadableExport):
                    self.journal.cannot_begin(error)
            except Exception:
                self._status = replace(self._status, failures=self._status.failures + 1)
                with steadily("the taking of checkpoints"):
                    raise

    async def _take(self) -> None:
        assert self._status is not None
        began = time.monotonic()
        remembered = None if self.settling is None else self.settling.remembered  # what comes later is not in it
        number, continues = await self._moments.on_the_thread(self._look)
        if not len(self._exports) and self.journal is None and number == FIRST:
            return  # there never was anything to keep
        try:
            taken = await self._take_moment(number, continues=continues)
        except UserError as error:
            log.warning("no place for further copies, so those of the last checkpoint make room: %s", str(error))
            taken = None
        if taken is None:  # and nobody has these in hand any more, as what was raised had, and whoever was given it
            await self._make_places()
            taken = await self._take_moment(number, continues=continues)
        whole = self._last is None or not continues or self._is_long()
        if taken is self._last and continues and (self.journal is None or self.journal.status.usable):
            await self._moments.release(taken)
            await self._follow(remembered, self._chain[-1].number, taken)
            self._status = replace(self._status, moment=time.time(), seconds=time.monotonic() - began)
            return
        await self._precede(taken)
        taken, progress = await self._moments.write_readable(
            taken, lambda moment: self._write_best(number, moment, whole=whole, continues=continues), self._as_it_was
        )
        await self._drop()
        self._last = taken
        if self.journal is not None:
            await self.journal.stands(number, taken)
        elif not self._beside_state:
            await self._moments.on_the_thread(lambda: self._forget_journal(number))
        await self._follow(remembered, number, taken)
        self._status = replace(
            self._status,
            moment=taken.taken_ns / 1e9,
            seconds=time.monotonic() - began,
            stream_bytes=progress.bytes_written,
            held_back=tuple(taken.names_behind()),
        )

    async def _take_moment(self, number: int, *, continues: bool) -> Moment:
        if self.journal is not None:
            return await self.journal.begin_checkpoint(number, self._last if continues else None)
        return await self._moments.take(self._last)

    async def _make_places(self) -> None:
        """In pools that have none left for copies: or else what changed since the last would never have them again."""
        pools = {service.pool for service in self._pools.values()}
        if self._last is not None:
            self._last = await self._moments.without(self._last, pools)
        if self.journal is not None:
            await self.journal.give_way(pools)

    async def _follow(self, stands: Remembered | None, number: int, taken: Moment) -> None:
        if self.settling is not None and (self.journal is None or self.journal.status.usable):
            await self.settling.follow(stands, number, taken.roster)

    async def _precede(self, taken: Moment) -> None:
        """What was noted is there before it stands. Raises OSError; then it is let go."""
        try:
            if self.settling is not None:
                await self.settling.precede()
        except OSError:
            await self._moments.release(taken)
            raise

    def _as_it_was(self) -> Moment | None:
        """What an export that cannot be read is told as: where a journal may have more of it, as the journal has it."""
        return self._last if self.journal is None else self.journal.as_it_was

    async def _write_best(self, number: int, taken: Moment, *, whole: bool, continues: bool) -> Progress:
        """A whole one if it is time for one, and can be; else what changed, if there is something to go on from."""

        def write(*, whole: bool) -> Awaitable[Progress]:
            return self._moments.on_the_thread(lambda: self._write(number, taken, whole=whole))

        may_go_on = whole and continues and self._last is not None
        try:
            if may_go_on or (whole and self.journal is not None and self.journal.status.usable):
                await self._moments.on_the_thread(self._require_room)
            return await write(whole=whole)
        except (UnreadableExport, OSError) as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not may_go_on or (isinstance(error, OSError) and not is_full):
                raise
            self._goes_on_to = len(self._chain) + LONGEST_CHAIN
            remedy = "making room mends it" if is_full else "writing the block mends it"
            log.warning("no whole checkpoint can be written, so what changed is; %s: %s", remedy, reason_of(error))
        return await write(whole=False)

    def _require_room(self) -> None:
        """On the thread: for a whole one, no larger than what is stored, or than the last. Trying would take the room
        of a journal that still has some. Raises OSError.
        """
        try:
            found = os.statvfs(self._directory)
        except OSError:  # trying says more
            return
        needed = min([self._stored(), *self._chain_bytes[:1]])
        knows_its_size = found.f_blocks > 0  # not each network's does
        if knows_its_size and found.f_bavail * found.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))

    def _stored(self) -> int:
        """What a whole one takes, but for its tables."""
        return sum(service.pool.stats().compr_data_size for service in tuple(self._pools.values()))  # not its pages

    def _why(self, error: Exception) -> str:
        """On the thread: why one failed, and what helps."""
        if not isinstance(error, OSError):
            return reason_of(error)
        remedy = "the next one is tried all the same"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"make room there: a whole one takes about {format_size(self._stored())}"
            with contextlib.suppress(OSError):
                free = os.statvfs(self._directory)
                remedy += f", and {format_size(free.f_bavail * free.f_frsize)} are free"
        return f"{self._directory}: {reason_of(error)}; {remedy}"

    def _look(self) -> tuple[int, bool]:
        """On the thread: the number of the next one, and whether the files that it would go on from are all there."""
        known = self.place.look()
        self._damaged_files = count_aside(self._directory)
        for left in unfinished_in(self._directory):  # of one that failed, where it could not be removed then
            with contextlib.suppress(OSError):
                left.unlink()
        missing = [
            one.path.name
            for one, identity in zip(self._chain, self._chain_identities, strict=True)
            if one.number not in known
            or identity_of(known[one.number].path) != identity  # of others, where it was away
        ]
        if missing:
            log.warning("%s is gone from %s; the next checkpoint is a whole one", missing[0], self._directory)
        return max([next_number(self._directory), *[one.number + 1 for one in self._chain]]), not missing

    def _forget_journal(self, number: int) -> None:
        """On the thread: of a server before this one, whose FLUSH waited for it."""
        try:
            if forget_journal(self._directory, number):
                log.info("no FLUSH waits for a journal any more, and %s holds none", self._directory)
        except (OSError, UserError) as error:
            log.warning("an old journal in %s stays until the next checkpoint: %s", self._directory, reason_of(error))

    def _is_long(self) -> bool:
        """Another chain is to begin."""
        is_long = len(self._chain) >= LONGEST_CHAIN or sum(self._chain_bytes[1:]) > self._chain_bytes[0]
        return is_long and len(self._chain) >= self._goes_on_to

    def _write(self, number: int, taken: Moment, *, whole: bool) -> Progress:
        """On the thread: one file, and away with what is not kept."""
        known = checkpoints_in(self._directory)
        since = None if whole else self._chain[-1].number
        told = taken.told_since(None if whole else self._last)
        progress, refused, gives_way = Progress(), self._refused(), not self._gave_way
        self._writing = progress
        path = self._directory / name_of(number, since)
        with _durable(path) as descriptor, os.fdopen(os.dup(descriptor), "wb", WRITE_AT_ONCE_BYTES) as file:

            def write(content: bytes) -> None:
                if gives_way and self._full_since(refused):
                    self._gave_way = True
                    raise StreamError("a write found no room in a pool, and the copies of this one keep some")
                _write_all(file, content)

            send(told, taken.taken_ns, f"nbdzram {__version__}", write, progress, identity=taken.identity)
        self._gave_way = False
        if whole:
            self._chain, self._chain_identities, self._chain_bytes, self._goes_on_to = [], [], [], 0
        self._chain.append(Checkpoint(number, since, path))
        self._chain_identities.append(taken.identity)
        self._chain_bytes.append(progress.bytes_written)
        self.place.wrote = taken.identity
        if whole:
            try:
                self._forget(known)
            except (OSError, UserError) as error:  # it stands all the same, and the next one tells what changed since
                reason = reason_of(error)
                log.warning("old checkpoints in %s stay until the next whole one: %s", self._directory, reason)
        return progress

    def _forget(self, known: Mapping[int, Checkpoint]) -> None:
        """Away with what is older than the chains to keep, the newest files first: what is left can be read."""
        for one in beyond([*known.values(), self._chain[0]], self._config.keep):
            one.path.unlink(missing_ok=True)
        forget_aside(self._directory, self._config.keep)
        sync_directory(self._directory)


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[int]:
    """A file that has its name once all of it is on the disk, and is not there before."""
    fresh = path.with_suffix(".new")
    # One that is there could not be removed when it failed, as where the file system could not be written for a while.
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        yield descriptor
        os.fsync(descriptor)
        fresh.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)
