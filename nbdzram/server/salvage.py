"""A stream of what can be read in a state directory whose arenas cannot be opened (`nbdzram check --salvage`).

Each arena is read as far as it is right (engine/salvage); nothing in the directory is changed. A block that is lost is
a hole in the stream, and told; an export whose directory entry is wrong has no name and no size, and is only counted.
Who may attach is what the directory remembers; where that is lost too, nobody.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdzram import __version__
from nbdzram.bounds import UNBOUND
from nbdzram.config import NOBODY
from nbdzram.engine.codec import compress_lz4, fingerprint_of
from nbdzram.engine.salvage import HOLE, OBJECT, WORD, Salvage
from nbdzram.errors import ArenaError, StreamError, UserError
from nbdzram.server.received import valid_name
from nbdzram.server.state import ARENA_SUFFIX, ExportRecord, remembered_in
from nbdzram.stream import layout
from nbdzram.stream.layout import ExportPart, Header, Kind, Origin, PoolPart
from nbdzram.stream.sending import Progress, Writer

RAW, LZ4 = 1, 2
RAW_LENGTH = 3625
"""From so many bytes on LZ4 is not worth it, as for the engine."""
OBJECTS_AT_ONCE_BYTES = 256 << 10
RUN_SKIP, RUN_SAME, RUN_OBJECTS = 0, 2, 3


@dataclass(frozen=True, slots=True)
class Lost:
    """Blocks of an export that could not be read."""

    export: str
    first: int
    count: int


@dataclass(slots=True)
class Salvaged:
    """What came of it."""

    exports: list[str] = field(default_factory=list)
    blocks: int = 0
    stream_bytes: int = 0
    lost: list[Lost] = field(default_factory=list)
    lost_exports: int = 0
    lost_pools: list[str] = field(default_factory=list)  # each with the reason
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return not (self.lost or self.lost_exports or self.lost_pools)


@dataclass(frozen=True, slots=True)
class _Found:
    """One export, and the number that its arena knows it by."""

    arena: Salvage
    number: int
    part: ExportPart


def salvage(directory: Path, write: Callable[[bytes], None]) -> Salvaged:
    """Write the stream. Raises UserError: there is nothing to be read; OSError, as `write` does."""
    outcome = Salvaged()
    rules = _rules(directory, outcome)
    pools = {path.stem: _exports_of(path, rules, outcome) for path in sorted(directory.glob(f"*{ARENA_SUFFIX}"))}
    pools = {name: found for name, found in pools.items() if found}
    count = sum(len(found) for found in pools.values())
    if not count:
        why = "; ".join(outcome.lost_pools) or "there is no arena"
        raise UserError(f"nothing can be read in {directory}: {why}")
    progress = Progress()
    writer = Writer(write, progress)
    features = layout.features_of(one.part for found in pools.values() for one in found)
    writer.begin(Header(bytes(16), time.time_ns(), len(pools), count, f"nbdzram {__version__}"), features)
    for number, (name, found) in enumerate(pools.items()):
        writer.add(Kind.POOL, layout.pool_body(PoolPart(number, name)))
        teller = _Teller(found[0].arena, writer, progress, outcome)
        for one in found:
            teller.tell(one)
    writer.end()
    outcome.blocks, outcome.stream_bytes = progress.blocks, progress.bytes_written
    return outcome


def _rules(directory: Path, outcome: Salvaged) -> dict[str, ExportRecord]:
    try:
        return remembered_in(directory).exports
    except (UserError, OSError) as error:
        outcome.notes.append(f"who may attach is lost, so nobody may until somebody says who: {error}")
        return {}


def _exports_of(path: Path, rules: dict[str, ExportRecord], outcome: Salvaged) -> list[_Found]:
    try:
        arena = Salvage(str(path))
    except ArenaError as error:
        outcome.lost_pools.append(str(error))
        return []
    found, lost = arena.exports()
    outcome.lost_exports += lost
    parts = []
    for number, name, size, read_only, domain in found:
        rule = rules.get(name)
        access = rule.access if rule is not None else NOBODY
        part = ExportPart(
            number=len(outcome.exports),
            name=name,
            size_bytes=size,
            read_only=read_only,
            domain=domain,
            identity=0,
            origin=Origin.HOLES,
            origin_number=0,
            origin_name="",
            description=rule.description if rule is not None else "",
            admits_nobody=access.nobody,
            addresses=access.addresses,
            certificates=access.certificates,
            bounds=rule.bounds if rule is not None else UNBOUND,
        )
        why = _why_not(part, outcome)
        if why:
            outcome.notes.append(f"an export in {path} is left out: {why}")
            outcome.lost_exports += 1
            continue
        outcome.exports.append(name)
        parts.append(_Found(arena, number, part))
    return parts


def _why_not(part: ExportPart, outcome: Salvaged) -> str:
    """Why nobody could receive a stream with this export, if that is so: all others of it would be lost with it."""
    try:
        name = valid_name("", part)
    except StreamError as error:
        return str(error)
    return f"there are two of the name '{name}'" if name in outcome.exports else ""


class _Teller:
    """Writes the exports of one arena."""

    def __init__(self, arena: Salvage, writer: Writer, progress: Progress, outcome: Salvaged) -> None:
        self._arena = arena
        self._writer = writer
        self._progress = progress
        self._outcome = outcome
        self._told: dict[int, bool] = {}  # by handle: whether it could be read

    def tell(self, one: _Found) -> None:
        self._writer.add(Kind.EXPORT, layout.export_body(one.part))
        for first, count, entries in self._arena.leaves(one.number):
            if entries is None:
                self._lose(one.part.name, first, count)
                continue
            self._tell_objects(one.part.domain, {value for kind, value in entries if kind == OBJECT})
            runs = b"".join(self._runs(one.part.name, first, entries))
            self._writer.add(Kind.BLOCKS, layout.blocks_head(one.part.number, first), runs)
        self._progress.exports += 1

    def _tell_objects(self, domain: int, handles: Iterable[int]) -> None:
        pending = bytearray()
        for handle in sorted(handle for handle in handles if handle not in self._told):
            block = self._arena.content(handle)
            self._told[handle] = block is not None
            if block is None:
                continue
            encoded, kind = compress_lz4(block), LZ4
            if len(encoded) >= RAW_LENGTH:
                encoded, kind = block, RAW
            pending += struct.pack("<IHBBQ", handle, len(encoded), kind, 0, fingerprint_of(block)) + encoded
            self._progress.objects += 1
            self._progress.object_bytes += len(encoded)
            if len(pending) >= OBJECTS_AT_ONCE_BYTES:
                self._writer.add(Kind.OBJECTS, layout.objects_head(domain), bytes(pending))
                pending.clear()
        if pending:
            self._writer.add(Kind.OBJECTS, layout.objects_head(domain), bytes(pending))

    def _runs(self, name: str, first: int, entries: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """A run for each block: this is no place to be clever."""
        for at, (kind, value) in enumerate(entries):
            if kind == WORD:
                self._progress.blocks += 1
                yield struct.pack("<HHQ", RUN_SAME, 1, value)
            elif kind == OBJECT and self._told[value]:
                self._progress.blocks += 1
                yield struct.pack("<HHI", RUN_OBJECTS, 1, value)
            else:
                if kind != HOLE:
                    self._lose(name, first + at, 1)
                yield struct.pack("<HH", RUN_SKIP, 1)

    def _lose(self, name: str, first: int, count: int) -> None:
        lost = self._outcome.lost
        if lost and lost[-1].export == name and lost[-1].first + lost[-1].count == first:
            lost[-1] = Lost(name, lost[-1].first, lost[-1].count + count)
        else:
            lost.append(Lost(name, first, count))
