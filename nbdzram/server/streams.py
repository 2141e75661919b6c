"""Streams of a server's exports: sent to whoever asks, received and offered, or restored before it serves.

    send      moment (concealed copies) ── a thread writes ── copies deleted
    receive   a thread reads into concealed disks ── all offered together, or deleted
    restore   the same, before anything is offered, into pools that are empty

Clients go on meanwhile. What a stream needs of the changes' order (names, rules, what is remembered) it does as a
change, through Changes; the long part between is none.

A copy keeps what clients overwrite meanwhile. That is bounded: the first write that finds no room ends all streams that
are being sent from its pool. Of one that is resumable, what there is when its pipe breaks is kept for a while, on
either side (interrupted.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from nbdzram import __version__
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import ExportExists, NoSuchExport, StreamCut, StreamError, UserError
from nbdzram.server.changes import Changes
from nbdzram.server.exports import Export, Exports
from nbdzram.server.interrupted import KEPT_SECONDS, MOST_KEPT, SENT_SECONDS, Kept, Shelf
from nbdzram.server.pools import PoolService
from nbdzram.server.received import place_in, valid_name
from nbdzram.server.runs import STOPS
from nbdzram.server.telling import Base, Seen, Told, tell
from nbdzram.status import ReceiveReport, SendReport, StreamStatus
from nbdzram.stream.layout import ExportPart
from nbdzram.stream.marks import Marks
from nbdzram.stream.pipe import Pipe
from nbdzram.stream.position import Position, read_identity, read_token
from nbdzram.stream.reading import opening
from nbdzram.stream.receiving import Intake, Place, Received, Receiver
from nbdzram.stream.sending import Progress, Sending
from nbdzram.units import format_seconds

MOST_AT_ONCE = 8
"""Streams: each has a thread, and the copies of its moment."""
WATCH_SECONDS = 1.0
ROOM_SAYS = "a write found no room in the pool, and the stream's copies keep some: it was ended"

Outcome = TypeVar("Outcome")

log = logging.getLogger("nbdzram.server")


@dataclass(slots=True)
class _Moment:
    """Copies that are being sent."""

    copies: list[Disk]
    pools: Told
    taken_ns: int = field(default_factory=time.time_ns)


class Streams:
    """Of one server."""

    def __init__(self, changes: Changes, exports: Exports, pools: dict[str, PoolService]) -> None:
        self._changes = changes
        self._exports = exports
        self._pools = pools
        self._pipes: set[Pipe] = set()
        self._running: set[asyncio.Task[object]] = set()
        self._threads = ThreadPoolExecutor(max_workers=MOST_AT_ONCE, thread_name_prefix="stream")
        self._told: dict[Pipe, Callable[[], StreamStatus]] = {}  # what there is to say of those under way
        self._within: dict[Pipe, Callable[[], Sequence[Pool]]] = {}  # ... and where what they hold lies
        self._moments: Shelf[tuple[_Moment, Sending]] = Shelf("sent", self._on_a_thread)
        self._parts: Shelf[Receiver] = Shelf("received", self._on_a_thread)
        changes.ask_before_removal(self.held_in)

    async def stop(self, why: str = STOPS) -> None:
        """End those under way; nothing of them stays. `why`: at the other end it is told, where that can be told."""
        for pipe in self._pipes:
            pipe.cancel(why)
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._moments.stop()
        await self._parts.stop()
        self._threads.shutdown()

    async def send(self, names: Sequence[str], since: str | None, pipe: Pipe, *, resumable: bool = False) -> SendReport:
        """Write a stream of these exports, of all if none is named, as they are now. Raises UserError, NoSuchExport.

        resumable: the moment is kept for a while, also behind a StreamCut.
        """
        with self._counted(pipe):
            taken = await self._changes.alone(self._take(names, since))
            progress, marks = Progress(), Marks() if resumable else None
            sending = Sending(taken.pools, taken.taken_ns, f"nbdzram {__version__}", progress, marks=marks)
            return await self._write(taken, sending, progress, pipe, keep=resumable)

    async def resume(self, token: str, pipe: Pipe) -> SendReport:
        """Write what follows behind a position of a stream that was interrupted. Raises UserError."""
        position = read_token(token)
        with self._counted(pipe):
            kept = self._moments.take(position.identity)
            if kept is None:
                raise StreamError(_not_kept("moment", position.identity))
            (taken, sending), progress = kept.subject, Progress()
            try:
                sending.go_back(position, progress)
            except StreamError:
                await self._moments.keep(kept)
                raise
            return await self._write(taken, sending, progress, pipe, keep=True)

    async def receive(self, prefix: str, pool: str | None, pipe: Pipe, *, resumable: bool = False) -> ReceiveReport:
        """Offer what a stream holds, with `prefix` before its names. Raises UserError; then nothing of it stays.

        resumable: behind a StreamCut what came is kept for a while. What goes on with a stream goes where its first
        part went.
        """
        with self._counted(pipe):
            began = time.monotonic()
            position = await self._on_a_thread(lambda: opening(pipe.read))
            if position is None:
                receiver = Receiver(lambda name: self._place(name, pool), lambda part: self._name_for(prefix, part))
            else:
                receiver, resumable = await self._goes_on(position), True
            self._told[pipe] = lambda: _receiving(receiver)
            self._within[pipe] = lambda: receiver.pools
            try:
                received = await self._on_a_thread(lambda: receiver.receive(pipe.read, begun=True, keep=resumable))
            except StreamCut as error:
                if not resumable or receiver.header is None:
                    raise
                raise StreamCut(f"{error}; {await self._keep_part(receiver)}") from error
            try:
                await self._changes.alone(self._changes.offer_received(received))
            except BaseException:
                await asyncio.shield(self._on_a_thread(receiver.discard))
                raise
            return _report(received, receiver.intake, time.monotonic() - began)

    # ---- what was interrupted ----

    def status(self) -> tuple[StreamStatus, ...]:
        """The streams that are under way, and what is kept of others."""
        return (*[tell_of() for tell_of in self._told.values()], *self._moments.status(), *self._parts.status())

    def held_in(self, pool: Pool) -> str | None:
        """In words, what lies in a pool of a stream that is under way, or was interrupted, and what to do about it."""
        kept = self._moments.holder_in(pool) or self._parts.holder_in(pool)
        if kept is not None:
            return (
                f"what is kept of the stream {kept.identity.hex()} that was interrupted; let it go on, or give it up "
                f"with `nbdzram streams abandon {kept.identity.hex()}`"
            )
        if any(pool in pools() for pools in self._within.values()):
            return "what a stream that is under way sends or receives; wait until it has ended, or end it"
        return None

    async def abandon(self, name: str) -> None:
        """Nothing is kept of this stream any more, whichever way it went. Raises StreamError."""
        identity = read_identity(name)
        gone = [await shelf.let_go(identity) for shelf in (self._moments, self._parts)]
        if not any(gone):
            raise StreamError(_not_kept("part", identity))

    async def _goes_on(self, position: Position) -> Receiver:
        """What came before, kept here and as long as the continuation says."""
        kept = self._parts.take(position.identity)
        if kept is None:
            raise StreamError(_not_kept("first part", position.identity))
        if kept.subject.position != position:
            await self._parts.keep(kept)
            raise StreamError(
                f"this goes on behind record {position.records} of the stream {position.identity.hex()}, and "
                f"{kept.records} records of it came; send it with --resume {kept.token}"
            )
        return kept.subject

    async def _keep_part(self, receiver: Receiver) -> str:
        """And what is to be said of it."""
        position = receiver.position
        await self._parts.keep(
            Kept(
                identity=position.identity,
                subject=receiver,
                exports=receiver.names,
                pools=receiver.pools,
                discard=receiver.discard,
                records=position.records,
                stream_bytes=receiver.intake.counted.bytes_read,
                token=position.token,
            )
        )
        return (
            f"what came is kept for {format_seconds(KEPT_SECONDS)}: go on with `nbdzram send --resume {position.token}`"
            f", or give it up with `nbdzram streams abandon {position.identity.hex()}`"
        )

    async def _write(
        self, taken: _Moment, sending: Sending, progress: Progress, pipe: Pipe, *, keep: bool
    ) -> SendReport:
        """All that is left of a stream; then its copies go, or are kept."""
        began = time.monotonic()
        names = tuple(source.part.name for _, _, sources in taken.pools for source in sources)
        watch = asyncio.create_task(self._watch(taken, pipe))
        self._told[pipe] = lambda: _sending(sending, names, progress)
        self._within[pipe] = lambda: [pool for _, pool, _ in taken.pools]

        def work() -> None:
            sending.write_to(pipe.write)
            pipe.end()

        seconds = 0.0
        try:
            await self._on_a_thread(work)
            seconds = SENT_SECONDS
        except StreamCut as error:
            seconds = KEPT_SECONDS
            if not keep:
                raise
            raise StreamCut(
                f"{error}; its moment is kept, and `nbdzram streams` where it is received has the token"
            ) from error
        finally:
            watch.cancel()
            await asyncio.shield(asyncio.create_task(self._put_away(taken, sending, names, progress, seconds * keep)))
        return SendReport(
            exports=names,
            blocks=progress.blocks,
            objects=progress.objects,
            object_bytes=progress.object_bytes,
            stream_bytes=progress.bytes_written,
            seconds=time.monotonic() - began,
        )

    async def _put_away(
        self, taken: _Moment, sending: Sending, names: tuple[str, ...], progress: Progress, seconds: float
    ) -> None:
        """Keep the copies for so long, or delete them."""

        def discard() -> None:
            moment.discard(taken.copies)

        if not seconds:
            return await self._on_a_thread(discard)
        kept = Kept(
            identity=sending.identity,
            subject=(taken, sending),
            exports=names,
            pools=[pool for _, pool, _ in taken.pools],
            discard=discard,
            records=sending.position.records,
            stream_bytes=progress.bytes_written,
            token=None,
        )
        await self._moments.keep(kept, seconds)
        return None

    # ---- sending ----

    async def _take(self, names: Sequence[str], since: str | None) -> _Moment:
        """The moment: copies of the exports, and of the bases that the receiver has."""
        chosen = [self._exports.get(name) for name in dict.fromkeys(names)] if names else list(self._exports)
        bases = {} if since is None else self._bases(chosen, since, all_of_them=not names)
        chosen = [export for export in chosen if export not in bases.values()]
        if not chosen:
            raise UserError("there is no export to send")
        return await asyncio.to_thread(self._copy, chosen, bases)

    def _copy(self, chosen: Sequence[Export], bases: dict[Export, Export]) -> _Moment:
        """On a thread, as a part of a change: nothing of these exports is changed meanwhile but by clients."""
        for export in (*chosen, *bases.values()):
            if export.read_only and not export.disk.identity:
                export.disk.identify(moment.new_identity())
        disks = [export.disk for export in [*chosen, *dict.fromkeys(bases.values())]]
        token = os.urandom(8).hex()
        copies = moment.snapshot_together(disks, [f"\n{token} {number}" for number in range(len(disks))])
        copy_of = dict(zip(disks, copies, strict=True))
        known = {one.disk: Base(base.name, base.disk.identity, copy_of[base.disk]) for one, base in bases.items()}
        try:
            seen = [Seen.of(export) for export in chosen]
            return _Moment(copies, tell(seen, copy_of, known, {one.disk: one.disk.identity for one in chosen}))
        except BaseException:
            moment.discard(copies)
            raise

    def _bases(self, chosen: Sequence[Export], since: str, *, all_of_them: bool) -> dict[Export, Export]:
        """Of each export the snapshot that the receiver has: SINCE, or EXPORT@SINCE, also for a later EXPORT@OTHER."""
        known = {export.name: export for export in self._exports}
        bases = {}
        for export in chosen:
            stem = export.name.rpartition("@")[0]
            candidates = [f"{export.name}@{since}", f"{stem}@{since}", since]
            found = next((known[name] for name in candidates if name in known and name != export.name), None)
            if found is None or found.pool_name != export.pool_name:
                if all_of_them:
                    continue  # it came later: all of it is new
                raise NoSuchExport(
                    f"there is no snapshot '{since}' or '{export.name}@{since}' in the pool '{export.pool_name}'; "
                    "take one with `nbdzram snapshot`, and send a whole stream of it first"
                )
            if not found.read_only:
                raise UserError(
                    f"the export '{found.name}' may be written, so nothing can be sent since it; snapshot it"
                )
            bases[export] = found
        return bases

    async def _watch(self, taken: _Moment, pipe: Pipe) -> None:
        """A stream gives way to writes."""
        pools = [pool for _, pool, _ in taken.pools]
        before = [pool.failed_writes for pool in pools]
        while [pool.failed_writes for pool in pools] == before:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(WATCH_SECONDS)
        pipe.cancel(ROOM_SAYS)

    # ---- receiving ----

    def _place(self, name: str, wanted: str | None) -> Place:
        """Where the exports of a pool go. Raises NoSuchExport."""
        chosen = wanted or name
        service = self._pools.get(chosen)
        if service is None:
            known = ", ".join(sorted(self._pools))
            raise NoSuchExport(
                f"there is no pool '{chosen[:80]}' for what the stream holds; there are: {known}; name one with --pool"
            )
        return place_in(chosen, service.pool)

    def _name_for(self, prefix: str, part: ExportPart) -> str:
        """What an export is to be called here. Raises UserError."""
        name = valid_name(prefix, part)
        self._changes.require_privacy(name, private=part.domain != 0)
        kept = self._parts.holder_of(name)
        if kept is not None:
            raise ExportExists(
                f"a part of '{name}' came with the stream {kept.identity.hex()} that was interrupted, and is kept; go "
                "on with that, give it up with `nbdzram streams abandon`, or give this another name with --prefix"
            )
        if any(export.name == name for export in self._exports):
            raise ExportExists(
                f"there is an export '{name}' already; give those of the stream other names with --prefix, or remove it"
            )
        return name

    # ---- parts ----

    @contextlib.contextmanager
    def _counted(self, pipe: Pipe) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        if len(self._pipes) >= MOST_AT_ONCE:
            raise UserError(f"{MOST_AT_ONCE} streams are under way, the most at once; wait until one has ended")
        self._pipes.add(pipe)
        self._running.add(task)
        try:
            yield
        finally:
            self._pipes.discard(pipe)
            self._told.pop(pipe, None)
            self._within.pop(pipe, None)
            self._running.discard(task)

    async def _on_a_thread(self, work: Callable[[], Outcome]) -> Outcome:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _report(received: Sequence[Received], intake: Intake, seconds: float) -> ReceiveReport:
    return ReceiveReport(
        exports=tuple(one.name for one in received),
        blocks=intake.blocks,
        objects=intake.objects,
        objects_folded=intake.objects_folded,
        object_bytes=intake.object_bytes,
        stream_bytes=intake.counted.bytes_read,
        seconds=seconds,
    )


def _sending(sending: Sending, names: tuple[str, ...], progress: Progress) -> StreamStatus:
    return _under_way("sent", sending.position, names, progress.bytes_written)


def _receiving(receiver: Receiver) -> StreamStatus:
    counted = receiver.intake.counted
    identity = receiver.header.identity if receiver.header is not None else b""
    return _under_way(
        "received", Position(identity, counted.records, counted.digest), receiver.names, counted.bytes_read
    )


def _under_way(way: str, position: Position, exports: tuple[str, ...], stream_bytes: int) -> StreamStatus:
    return StreamStatus(
        stream=position.identity.hex(),
        way=way,
        state="under way",
        exports=exports,
        records=position.records,
        stream_bytes=stream_bytes,
        seconds_left=None,
        token=None,
    )


def _not_kept(what: str, identity: bytes) -> str:
    return (
        f"no {what} of the stream {identity.hex()} is kept here, or it is under way: what was begun with --resumable "
        f"is kept for {format_seconds(KEPT_SECONDS)} at most, {MOST_KEPT} of them, until a write finds no room or "
        "the server ends; `nbdzram streams` shows what is left; without it, send the exports anew"
    )
