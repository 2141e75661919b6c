"""Writing a stream of copies that were taken at one moment (engine/moment).

Memory: one record, and two bits for each object (engine/walk), whatever is sent. Rot ends the stream, without its end
record: who reads it shows nothing of it then, and nothing that is not what was written ever stands in one.

A stream that may be interrupted keeps marks (marks.py): how it stood behind each of its last records. From any of them
it goes on, as long as its copies are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nbdzram.engine.dictionary import dictionary_of
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.walk import Told, Walk
from nbdzram.errors import EngineError, UnreadableExport
from nbdzram.stream import layout
from nbdzram.stream.layout import EndPart, ExportPart, Header, Kind, Origin, PoolPart
from nbdzram.stream.marks import Mark, Marks
from nbdzram.stream.position import Position, continuation

DICTIONARIES = 4
OBJECT_HEAD_BYTES = 16
NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One export to be sent: its copy, and the copy of the base that the receiver has, if there is one."""

    part: ExportPart
    copy: Disk
    base: Disk | None = None


@dataclass(slots=True)
class Progress:
    """How far a stream has come; read from any thread."""

    bytes_written: int = 0
    exports: int = 0
    blocks: int = 0
    objects: int = 0
    object_bytes: int = 0
    share: float = 0.0  # of the blocks that are looked at


class Writer:
    """Numbers the records, and adds them up."""

    def __init__(self, write: Callable[[bytes], None], progress: Progress, salt: int = 0) -> None:
        self.write = write
        self.progress = progress
        self.records = 0
        self.digest = 0
        self._salt = salt

    def begin(self, header: Header, features: int) -> None:
        """The preamble and the header."""
        self.put(layout.preamble(features))
        self.add(Kind.HEADER, layout.header_body(header))

    def add(self, kind: Kind, *parts: bytes, note: Callable[[], None] | None = None) -> None:
        """One record. Its note is taken first: who reads may have all of one that could not be written wholly."""
        framed, checksum = layout.record(self.records, kind, *parts, salt=self._salt)
        self.records += 1
        self.digest = layout.digest_on(self.digest, checksum)
        if note is not None:
            note()
        self.put(framed)

    def end(self) -> None:
        """The end record."""
        told = self.progress
        part = EndPart(told.exports, told.objects, told.object_bytes, told.blocks, self.records, self.digest)
        self.add(Kind.END, layout.end_body(part))

    def put(self, content: bytes) -> None:
        """Bytes that are no record."""
        self.write(content)
        self.progress.bytes_written += len(content)


class Sending:
    """One stream. Used by one thread at a time.

    Where it stands: behind the POOL record of `_pool`, the EXPORT record of its `_source`, and all blocks before
    `_block`; -1 where there is none yet.
    """

    def __init__(
        self,
        pools: Sequence[tuple[str, Pool, Sequence[Source]]],
        moment_ns: int,
        program: str,
        progress: Progress,
        *,
        identity: bytes | None = None,
        salt: int = 0,
        marks: Marks | None = None,
    ) -> None:
        """identity: 16 bytes that name the moment; salt: of a group of a journal; marks: it may be interrupted."""
        self.identity = identity or os.urandom(16)
        self._pools = pools
        self._total = sum(len(sources) for _, _, sources in pools)
        self._features = layout.features_of(source.part for _, _, sources in pools for source in sources)
        self._header = Header(self.identity, moment_ns, len(pools), self._total, program)
        self._writer = Writer(_nowhere, progress, salt)
        self._marks = marks
        self._pool = self._source = -1
        self._block = 0
        self._told = Told()
        self._dictionaries = 0  # bits of those that were sent of this pool
        self._unmarked = b""  # numbers of objects that are told, and stand in no record yet

    @property
    def position(self) -> Position:
        """Behind the last record that it wrote, or began to write."""
        return Position(self.identity, self._writer.records, self._writer.digest)

    def go_back(self, position: Position, progress: Progress) -> None:
        """Go on behind an earlier record, and tell `progress`. Raises StreamError; then nothing is changed."""
        assert self._marks is not None
        mark = self._marks.back_to(position)
        self._told.forget(self._unmarked)
        self._unmarked = b""
        self._writer.records, self._writer.digest, self._writer.progress = mark.records, mark.digest, progress
        self._pool, self._source, self._block = mark.pool, mark.source, mark.block
        self._told, self._dictionaries = mark.told, mark.dictionaries
        progress.blocks, progress.objects, progress.object_bytes = mark.blocks, mark.objects, mark.object_bytes

    def write_to(self, write: Callable[[bytes], None]) -> None:
        """All that is left of it. Blocks as `write` does; what that raises ends it. Raises UnreadableExport for rot."""
        self._writer.write = write
        if self._writer.records:
            self._writer.put(continuation(self.position, self._features))
        else:
            self._writer.put(layout.preamble(self._features))
            self._add(Kind.HEADER, layout.header_body(self._header))
        while True:
            if self._pool >= 0:
                self._send_exports(self._pools[self._pool][2])
            if self._pool + 1 == len(self._pools):
                break
            self._pool, self._source, self._block = self._pool + 1, -1, 0
            self._told, self._dictionaries = Told(), 0
            self._add(Kind.POOL, layout.pool_body(PoolPart(self._pool, self._pools[self._pool][0])))
        self._writer.progress.exports = self._total
        self._writer.end()

    def _send_exports(self, sources: Sequence[Source]) -> None:
        before = sum(len(told) for _, _, told in self._pools[: self._pool])
        while True:
            self._writer.progress.exports = before + max(self._source, 0)
            if self._source >= 0:
                source = sources[self._source]
                try:
                    self._send_blocks(source, _origin_of(source, sources))
                except EngineError as error:
                    raise UnreadableExport(source.part.name, str(error), self._block) from error
            if self._source + 1 == len(sources):
                return
            self._source, self._block = self._source + 1, 0
            self._add(Kind.EXPORT, layout.export_body(sources[self._source].part))

    def _send_blocks(self, source: Source, origin: Disk | None) -> None:
        walk = Walk(source.copy, origin, self._told, self._block)
        told = self._writer.progress
        while (step := walk.step()) is not None:
            first, blocks, dictionaries, objects, runs = step
            self._unmarked = walk.numbers
            for number, content in self._missing(dictionaries):
                self._add(Kind.DICTIONARY, layout.dictionary_head(number), content)
            if objects:
                count = len(self._unmarked) // NUMBER_BYTES
                told.objects += count
                told.object_bytes += len(objects) - count * OBJECT_HEAD_BYTES
                self._add(Kind.OBJECTS, layout.objects_head(source.part.domain), objects)
            told.blocks += blocks
            self._block = walk.position
            self._add(Kind.BLOCKS, layout.blocks_head(source.part.number, first), runs)
            told.share = (told.exports + walk.progress) / self._total

    def _missing(self, bits: int) -> Iterator[tuple[int, bytes]]:
        for number in range(DICTIONARIES):
            if bits & ~self._dictionaries & 1 << number:
                self._dictionaries |= 1 << number
                yield number, dictionary_of(self._pools[self._pool][1], number)

    def _add(self, kind: Kind, *parts: bytes) -> None:
        self._writer.add(kind, *parts, note=None if self._marks is None else lambda: self._note(kind))

    def _note(self, kind: Kind) -> None:
        numbers = b""
        if kind is Kind.OBJECTS:
            numbers, self._unmarked = self._unmarked, b""
        assert self._marks is not None
        self._marks.add(self._mark(numbers))

    def _mark(self, numbers: bytes) -> Mark:
        return Mark(
            records=self._writer.records,
            digest=self._writer.digest,
            pool=self._pool,
            source=self._source,
            block=self._block,
            told=self._told,
            numbers=numbers,
            dictionaries=self._dictionaries,
            blocks=self._writer.progress.blocks,
            objects=self._writer.progress.objects,
            object_bytes=self._writer.progress.object_bytes,
        )


def send(
    pools: Sequence[tuple[str, Pool, Sequence[Source]]],
    moment_ns: int,
    program: str,
    write: Callable[[bytes], None],
    progress: Progress,
    *,
    identity: bytes | None = None,
    salt: int = 0,
) -> None:
    """Write a whole stream that nobody resumes; see Sending."""
    Sending(pools, moment_ns, program, progress, identity=identity, salt=salt).write_to(write)


def _origin_of(source: Source, sources: Sequence[Source]) -> Disk | None:
    """The copy from which the blocks of an export are told."""
    if source.part.origin is Origin.EXPORT:
        return next(other.copy for other in sources if other.part.number == source.part.origin_number)
    return source.base


def _nowhere(_: bytes) -> None:
    raise AssertionError("where a stream is written is said first")
