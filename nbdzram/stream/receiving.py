"""Making a stream true: concealed disks that are filled as it comes, for whoever offers them when it has ended.

    HEADER ── POOL ── EXPORT: a concealed disk ── OBJECTS: stored, or found ── BLOCKS ── ... ── END: all of it is there

Whatever goes wrong before the end, all of it is deleted again; a process that is killed leaves it to the next opening
(engine/moment). So a stream is received wholly or not at all. Where it merely broke off, what came may be kept,
concealed as it is, for what goes on behind its last whole record (position.py). What its records may say in which order
is checked here; what an object or a run may be, in engine/absorb.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdzram.engine import moment
from nbdzram.engine.absorb import Absorber
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError, StreamCut, StreamError
from nbdzram.stream import layout
from nbdzram.stream.layout import EXPORTS_MAX, EndPart, ExportPart, Header, Kind, Origin
from nbdzram.stream.position import Position
from nbdzram.stream.reading import Counted, records

STAGING_BYTES = layout.BLOCK_SIZE << 32
"""Of a disk whose block N is object N: numbers have 32 bits."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where exports of a pool of the stream go."""

    name: str
    pool: Pool
    find_base: Callable[[ExportPart], Disk | None]
    """The disk in this pool, which nobody may write, with the identity of the export's origin."""


@dataclass(frozen=True, slots=True)
class Received:
    """One disk, concealed and complete."""

    name: str
    place: Place
    disk: Disk
    part: ExportPart


@dataclass(slots=True)
class Intake:
    """What has come so far; read from any thread."""

    counted: Counted = field(default_factory=Counted)
    exports: int = 0
    objects: int = 0
    objects_folded: int = 0
    objects_encoded_again: int = 0
    object_bytes: int = 0
    blocks: int = 0


class Receiver:
    """One stream. `place` says where the exports of a pool go, `name` what one is to be called; both may refuse."""

    def __init__(
        self, place: Callable[[str], Place], name: Callable[[ExportPart], str], intake: Intake | None = None
    ) -> None:
        self.intake = intake or Intake()
        self.header: Header | None = None
        self._place = place
        self._name = name
        self._token = os.urandom(8).hex()
        self._pools: list[_PoolReceiver] = []
        self._received: dict[int, Received] = {}
        self._told_names: set[str] = set()

    @property
    def position(self) -> Position:
        """Behind the last record that came."""
        assert self.header is not None
        return Position(self.header.identity, self.intake.counted.records, self.intake.counted.digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the exports that have begun to come."""
        return tuple([one.name for one in list(self._received.values())])

    @property
    def pools(self) -> list[Pool]:
        """In which something of it lies."""
        return [pool.place.pool for pool in self._pools]

    def receive(
        self,
        read: Callable[[int], bytes],
        *,
        salt: int = 0,
        alone: bool = True,
        begun: bool = False,
        keep: bool = False,
    ) -> list[Received]:
        """All of it: concealed disks that the caller offers or discards. Raises StreamError, UserError; then nothing is
        left. Blocks as `read` does, and `read` may raise to end it. salt, alone, begun: see records().

        keep: behind a StreamCut what came stays, if anything did, and another call goes on from `position`.
        """
        try:
            for kind, body in records(read, self.intake.counted, salt=salt, alone=alone, begun=begun):
                self._take(kind, body)
            self._end()
        except StreamCut:
            if not keep or self.header is None:
                self.discard()
            raise
        except EngineError as error:
            self.discard()
            raise StreamError(f"the stream cannot be received: {error}") from error
        except BaseException:
            self.discard()
            raise
        return list(self._received.values())

    def discard(self) -> None:
        """Nothing of it stays."""
        for pool in self._pools:
            pool.discard_staging()
        moment.discard([received.disk for received in self._received.values()])
        self._received.clear()

    def _take(self, kind: Kind, body: memoryview) -> None:
        if kind is Kind.HEADER:
            self.header = layout.read_header(body)
        elif kind is Kind.POOL:
            part = layout.read_pool(body)
            if part.number != len(self._pools):
                raise StreamError("the stream is damaged: a pool is missing")
            self._pools.append(_PoolReceiver(self._place(part.name), f"\n{self._token} {part.number}"))
        elif kind is Kind.END:
            self._compare(layout.read_end(body))
        elif not self._pools:
            raise StreamError("the stream is damaged: there is no pool before its exports")
        elif kind is Kind.EXPORT:
            self._add_export(layout.read_export(body))
        else:
            self._pools[-1].take(kind, body)
            self._count()

    def _add_export(self, part: ExportPart) -> None:
        if part.number != len(self._received) or part.number >= EXPORTS_MAX:
            raise StreamError("the stream is damaged: an export is missing")
        if part.name in self._told_names:
            raise StreamError(f"the stream is damaged: it has two exports {part.name[:80]!r}")
        self._told_names.add(part.name)
        pool, name = self._pools[-1], self._name(part)
        disk = pool.add_export(part, name)
        self._received[part.number] = Received(name, pool.place, disk, part)
        self.intake.exports += 1

    def _count(self) -> None:
        absorbers = [pool.absorber for pool in self._pools]
        self.intake.objects = sum(absorber.objects for absorber in absorbers)
        self.intake.objects_folded = sum(absorber.objects_folded for absorber in absorbers)
        self.intake.objects_encoded_again = sum(absorber.objects_encoded_again for absorber in absorbers)
        self.intake.object_bytes = sum(absorber.object_bytes for absorber in absorbers)
        self.intake.blocks = sum(absorber.blocks for absorber in absorbers)

    def _compare(self, end: EndPart) -> None:
        """Raises StreamError when what came is not what was sent."""
        assert self.header is not None
        came = (self.intake.exports, self.intake.objects, self.intake.blocks)
        if came != (end.exports, end.objects, end.blocks) or self.header.export_count != end.exports:
            raise StreamError(
                f"the stream is damaged: {came[0]} exports, {came[1]} objects and {came[2]} blocks came, and "
                f"{end.exports}, {end.objects} and {end.blocks} were sent"
            )

    def _end(self) -> None:
        """Nothing but the disks is left, and each has the identity of its content."""
        for pool in self._pools:
            pool.end_disks()
            pool.discard_staging()
        for received in self._received.values():
            if received.part.identity and received.part.read_only:
                received.disk.identify(received.part.identity)


class _PoolReceiver:
    """What comes for one pool of the stream. A folding domain has a staging disk once something comes for it: private
    exports have one each, and would take twice as many of the pool's places where nothing of most of them changed.
    """

    def __init__(self, place: Place, token: str) -> None:
        self.place = place
        self.absorber = Absorber(place.pool)
        self._token = token
        self._alike: dict[int, Disk] = {}  # the first disk of each folding domain of the stream
        self._staging: dict[int, Disk] = {}  # by folding domain too
        self._disks: dict[int, tuple[Disk, ExportPart]] = {}

    def add_export(self, part: ExportPart, name: str) -> Disk:
        """A concealed disk that is what the export is before its blocks come."""
        origin = self._origin(part)
        if origin is None:
            alike = self._alike.get(part.domain)
            private = part.domain != 0 and alike is None
            disk = moment.prepare(
                self.place.pool, name, part.size_bytes, read_only=part.read_only, private=private, alike=alike
            )
        else:
            (disk,) = moment.snapshot_together([origin], [name], read_only=part.read_only)
            try:
                self._require_unchanged(origin, part)
                if disk.size_bytes != part.size_bytes:
                    disk.resize(part.size_bytes)
            except BaseException:
                moment.discard([disk])
                raise
        self._alike.setdefault(part.domain, disk)
        self._disks[part.number] = (disk, part)
        return disk

    def take(self, kind: Kind, body: memoryview) -> None:
        """A dictionary, objects or blocks."""
        if kind is Kind.DICTIONARY:
            (number,), content = layout.read_head(body, "I")
            self.absorber.dictionary(number, content)
        elif kind is Kind.OBJECTS:
            (domain,), objects = layout.read_head(body, "I")
            if domain not in self._alike:
                raise StreamError("the stream is damaged: it has objects that no export may have")
            self.absorber.take_objects(self._staging_for(domain), objects)
        else:
            (number, nothing, first), runs = layout.read_head(body, "IIQ")
            if number not in self._disks or nothing:
                raise StreamError(f"the stream is damaged: it has blocks of an export {number} that it did not name")
            disk, part = self._disks[number]
            try:
                self.absorber.take_blocks(disk, self._staging_for(part.domain), first, runs)
            except StreamError as error:
                if disk.domain == self._alike[part.domain].domain:
                    raise
                raise StreamError(
                    f"'{part.name}' shares blocks with others of this stream where it was sent, and what it is told "
                    "from shares none with theirs here, as that came in a stream of its own; send it alone"
                ) from error

    def end_disks(self) -> None:
        """Nothing lies behind their ends."""
        for disk, _ in self._disks.values():
            self.absorber.end_disk(disk)

    def discard_staging(self) -> None:
        """What has come is held by the disks that name it, and by nothing else."""
        moment.discard(list(self._staging.values()))
        self._staging.clear()

    def _origin(self, part: ExportPart) -> Disk | None:
        if part.origin is Origin.EXPORT:
            if part.origin_number not in self._disks:
                raise StreamError(f"the stream is damaged: the export '{part.name}' is made from one that did not come")
            return self._disks[part.origin_number][0]
        if part.origin is Origin.BASE:
            base = self.place.find_base(part) if part.origin_number else None
            if base is None:
                raise StreamError(
                    f"the stream holds what changed in '{part.name}' since '{part.origin_name}', and the pool "
                    f"'{self.place.name}' has no read-only disk with that content; receive a stream of it first"
                )
            assert base.pool is self.place.pool, part.name
            return base
        return None

    def _require_unchanged(self, origin: Disk, part: ExportPart) -> None:
        """Behind a copy of an export: whoever changes one takes its identity away first. Raises StreamError."""
        if part.origin is Origin.BASE and not origin.concealed and origin.identity != part.origin_number:
            raise StreamError(
                f"the disk from which '{part.name}' is told, '{part.origin_name}' where it was sent, is being changed; "
                "receive a stream of it first"
            )

    def _staging_for(self, domain: int) -> Disk:
        if domain not in self._staging:
            name, alike = f"{self._token} {domain}", self._alike[domain]
            self._staging[domain] = moment.prepare(self.place.pool, name, STAGING_BYTES, alike=alike)
        return self._staging[domain]
