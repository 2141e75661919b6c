"""Checkpoints: all exports of a moment, again and again, as streams in a directory.

    00000001-full.stream   00000002-since-00000001.stream   00000003-since-00000002.stream   ...   00000018-full.stream

The first of a chain is whole; each other one holds what changed since the one before, told by comparing the copies of
two moments. A chain that has grown long, or larger than a whole one, ends, and another begins. What is older than the
chains to keep goes when the next whole one is durable.

A file is written beside its place, synced, renamed, and the directory synced: what has its name is whole, whatever the
power does. Files are read again by restore.py.

Between two checkpoints the copies of the last one keep what clients overwrite. They give way: when a write finds no
room they are dropped, and the next checkpoint is a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from nbdzram import __version__
from nbdzram.config import CheckpointConfig
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, StreamError, UserError
from nbdzram.server.chains import Checkpoint, checkpoints_in, name_of, sync_directory
from nbdzram.server.changes import Changes
from nbdzram.server.exports import Export, Exports
from nbdzram.server.pools import PoolService
from nbdzram.server.telling import Base, Told, tell
from nbdzram.status import CheckpointStatus
from nbdzram.stream.layout import ExportPart, Origin
from nbdzram.stream.sending import Progress, send

LONGEST_CHAIN = 64
"""Streams that a start has to read; at one a minute about an hour."""
LOOK_SECONDS = 1.0
WRITE_AT_ONCE_BYTES = 1 << 20

Outcome = TypeVar("Outcome")

log = logging.getLogger("nbdzram.server")


@dataclass(frozen=True, slots=True)
class _Taken:
    """Copies of a moment, and what is told of them."""

    copies: dict[Disk, Disk]  # by the disk that they are of
    identities: dict[Disk, int]
    told: Told
    taken_ns: int
    whole: bool  # nothing is told from what the last one has

    def said(self) -> list[ExportPart]:
        """What is told of the exports beside their blocks: equal if nothing but blocks may have changed."""
        parts = [source.part for _, _, sources in self.told for source in sources]
        return [replace(part, identity=0, origin=Origin.HOLES, origin_number=0, origin_name="") for part in parts]


class _UnchangedError(Exception):
    """There is nothing that the last checkpoint does not hold."""


class Checkpoints:
    """Of one server. start(), then stop() when all clients have their answers: it takes the last one."""

    def __init__(
        self, config: CheckpointConfig, changes: Changes, exports: Exports, pools: Mapping[str, PoolService]
    ) -> None:
        self._config = config
        self._changes = changes
        self._exports = exports
        self._pools = pools
        self._last: _Taken | None = None  # what the next one tells its changes from
        self._chain: list[Checkpoint] = []
        self._chain_bytes: list[int] = []
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # one checkpoint after another, and nobody drops copies meanwhile
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._status: CheckpointStatus | None = None

    @property
    def _directory(self) -> Path:
        assert self._config.directory is not None
        return self._config.directory

    @property
    def status(self) -> CheckpointStatus | None:
        """Of the newest that is whole; None: no directory is named."""
        return self._status

    def prepare(self) -> None:
        """Make the directory usable. Raises UserError."""
        if self._config.directory is None:
            return
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in self._directory.glob("*.new"):
                left.unlink()
            sync_directory(self._directory)
        except OSError as error:
            raise UserError(
                f"cannot keep checkpoints in {self._directory}: {error.strerror}; name a directory that this user may "
                "write"
            ) from error

    def start(self, moment_ns: int | None) -> None:
        """`moment_ns`: of the checkpoint that the server began from."""
        if self._config.directory is None:
            return
        self._status = CheckpointStatus(
            moment=None if moment_ns is None else moment_ns / 1e9,
            interval_seconds=self._config.interval_seconds,
            seconds=0.0,
            stream_bytes=0,
            failures=0,
        )
        self._task = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Take the last one, of what clients were answered."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.take(last=True)
        await self._give_way()
        self._thread.shutdown()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        due, refused = loop.time() + self._config.interval_seconds, self._refused()
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, max(due - loop.time(), 0.0)))
            if self._refused() != refused:
                refused = self._refused()
                await asyncio.shield(asyncio.create_task(self._give_way()))
            if loop.time() >= due:
                due = loop.time() + self._config.interval_seconds
                await asyncio.shield(asyncio.create_task(self.take()))

    def _refused(self) -> int:
        return sum(service.pool.stats().failed_writes for service in self._pools.values())

    async def _give_way(self) -> None:
        """The copies of the last one go, and the next one is whole."""
        async with self._turn:
            await self._drop()

    async def _drop(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            await self._on_the_thread(lambda: moment.discard(list(last.copies.values())))

    async def take(self, *, last: bool = False) -> None:
        """One, now; `last`: the server stops, and nothing is changed any more. A failure is counted and told."""
        async with self._turn:
            assert self._status is not None
            try:
                await self._take(last=last)
            except (UserError, EngineError, OSError, MemoryError) as error:
                self._status = replace(self._status, failures=self._status.failures + 1)
                log.warning("a checkpoint failed: %s", error)

    async def _take(self, *, last: bool) -> None:
        assert self._status is not None
        if not len(self._exports):
            return
        began = time.monotonic()
        taken = await (self._copy() if last else self._changes.alone(self._copy()))
        try:
            progress = await self._on_the_thread(lambda: self._write(taken))
        except _UnchangedError:
            await self._on_the_thread(lambda: moment.discard(list(taken.copies.values())))
            self._status = replace(self._status, moment=taken.taken_ns / 1e9, seconds=time.monotonic() - began)
            return
        except BaseException:
            await self._on_the_thread(lambda: moment.discard(list(taken.copies.values())))
            raise
        await self._drop()
        self._last = taken
        self._status = replace(
            self._status,
            moment=taken.taken_ns / 1e9,
            seconds=time.monotonic() - began,
            stream_bytes=progress.bytes_written,
        )

    def _is_long(self) -> bool:
        """Another chain is to begin."""
        return len(self._chain) >= LONGEST_CHAIN or sum(self._chain_bytes[1:]) > self._chain_bytes[0]

    async def _copy(self) -> _Taken:
        exports, whole = list(self._exports), self._last is None or self._is_long()
        return await self._on_the_thread(lambda: self._copy_all(exports, whole=whole))

    def _copy_all(self, exports: list[Export], *, whole: bool) -> _Taken:
        disks = [export.disk for export in exports]
        token = os.urandom(8).hex()
        copies = moment.snapshot_together(disks, [f"\n{token} {number}" for number in range(len(disks))])
        taken_ns = time.time_ns()
        try:
            identities = {}
            for disk, copy in zip(disks, copies, strict=True):
                identities[disk] = disk.identity or moment.new_identity()
                copy.identify(identities[disk])
            last = None if whole else self._last
            bases = {
                export: Base(export.name, last.identities[export.disk], last.copies[export.disk])
                for export in exports
                if last is not None and export.disk in last.copies
            }
            copy_of = dict(zip(disks, copies, strict=True))
            pools: dict[str, Pool] = {name: service.pool for name, service in self._pools.items()}
            told = tell(exports, copy_of, bases, pools, {export: identities[export.disk] for export in exports})
            return _Taken(copy_of, identities, told, taken_ns, whole)
        except BaseException:
            moment.discard(copies)
            raise

    def _write(self, taken: _Taken) -> Progress:
        """On the thread: one file, and away with what is not kept. Raises _UnchangedError."""
        known = checkpoints_in(self._directory)
        number = max([0, *known]) + 1
        since = None if taken.whole else self._chain[-1].number
        progress, refused = Progress(), self._refused()
        path = self._directory / name_of(number, since)
        with _durable(path) as descriptor, os.fdopen(os.dup(descriptor), "wb", WRITE_AT_ONCE_BYTES) as file:

            def write(content: bytes) -> None:
                if self._refused() != refused:
                    raise StreamError("a write found no room in a pool, and the copies of this one keep some")
                _write_all(file, content)

            send(taken.told, taken.taken_ns, f"nbdzram {__version__}", write, progress)
            if self._last is not None and not taken.whole and not progress.blocks and taken.said() == self._last.said():
                raise _UnchangedError
        if taken.whole:
            self._chain, self._chain_bytes = [], []
        self._chain.append(Checkpoint(number, since, path))
        self._chain_bytes.append(progress.bytes_written)
        if taken.whole:
            self._forget(known)
        return progress

    def _forget(self, known: Mapping[int, Checkpoint]) -> None:
        """Away with what is older than the chains to keep, the newest files first: what is left can be read."""
        wholes = sorted((one.number for one in known.values() if one.since is None), reverse=True)
        oldest = [self._chain[0].number, *wholes[: self._config.keep - 1]][-1]
        for one in sorted(known.values(), key=lambda one: -one.number):
            if one.number < oldest:
                with contextlib.suppress(FileNotFoundError):
                    one.path.unlink()
        sync_directory(self._directory)

    async def _on_the_thread(self, work: Callable[[], Outcome]) -> Outcome:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[int]:
    """A file that has its name once all of it is on the disk, and is not there before."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
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
