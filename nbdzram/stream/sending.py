"""Writing a stream of copies that were taken at one moment (engine/moment).

Memory: one record, and two bits for each object (engine/walk), whatever is sent. Rot ends the stream, without its end
record: who reads it shows nothing of it then, and nothing that is not what was written ever stands in one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nbdzram.engine.dictionary import dictionary_of
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.walk import Told, Walk
from nbdzram.errors import EngineError, StreamError
from nbdzram.stream import layout
from nbdzram.stream.layout import EndPart, ExportPart, Header, Kind, Origin, PoolPart

DICTIONARIES = 4


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
        self._write = write
        self._progress = progress
        self._salt = salt
        self._records = 0
        self._digest = 0

    def begin(self, header: Header) -> None:
        """The preamble and the header."""
        self._put(layout.preamble())
        self.add(Kind.HEADER, layout.header_body(header))

    def add(self, kind: Kind, *parts: bytes) -> None:
        """One record."""
        framed, checksum = layout.record(self._records, kind, *parts, salt=self._salt)
        self._put(framed)
        self._records += 1
        self._digest = layout.digest_on(self._digest, checksum)

    def end(self) -> None:
        """The end record."""
        told = self._progress
        self.add(
            Kind.END,
            layout.end_body(
                EndPart(told.exports, told.objects, told.object_bytes, told.blocks, self._records, self._digest)
            ),
        )

    def _put(self, content: bytes) -> None:
        self._write(content)
        self._progress.bytes_written += len(content)


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
    """Write the whole stream. Blocks as `write` does; what that raises ends it. Raises StreamError for rot.

    identity: 16 bytes that name the moment; salt: of a group of a journal.
    """
    total = sum(len(sources) for _, _, sources in pools)
    writer = Writer(write, progress, salt)
    writer.begin(Header(identity or os.urandom(16), moment_ns, len(pools), total, program))
    for number, (name, pool, sources) in enumerate(pools):
        writer.add(Kind.POOL, layout.pool_body(PoolPart(number, name)))
        _PoolSender(pool, writer, progress, total).send(sources)
    writer.end()


class _PoolSender:
    """What is told of one pool: numbers of objects and dictionaries are its own."""

    def __init__(self, pool: Pool, writer: Writer, progress: Progress, total: int) -> None:
        self._pool = pool
        self._writer = writer
        self._progress = progress
        self._total = total
        self._told = Told()
        self._dictionaries = 0  # bits of those that were sent

    def send(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._writer.add(Kind.EXPORT, layout.export_body(source.part))
            try:
                self._send_blocks(source, _origin_of(source, sources))
            except EngineError as error:
                raise StreamError(f"the export '{source.part.name}' cannot be sent: {error}") from error
            self._progress.exports += 1

    def _send_blocks(self, source: Source, origin: Disk | None) -> None:
        walk = Walk(source.copy, origin, self._told)
        told, before = self._progress, (self._progress.objects, self._progress.object_bytes)
        known = (self._told.objects, self._told.object_bytes)
        while (step := walk.step()) is not None:
            first, blocks, dictionaries, objects, runs = step
            for number, content in self._missing(dictionaries):
                self._writer.add(Kind.DICTIONARY, layout.dictionary_head(number), content)
            if objects:
                self._writer.add(Kind.OBJECTS, layout.objects_head(source.part.domain), objects)
            told.blocks += blocks
            told.objects = before[0] + self._told.objects - known[0]
            told.object_bytes = before[1] + self._told.object_bytes - known[1]
            self._writer.add(Kind.BLOCKS, layout.blocks_head(source.part.number, first), runs)
            told.share = (told.exports + walk.progress) / self._total

    def _missing(self, bits: int) -> Iterator[tuple[int, bytes]]:
        for number in range(DICTIONARIES):
            if bits & ~self._dictionaries & 1 << number:
                yield number, dictionary_of(self._pool, number)
                self._dictionaries |= 1 << number


def _origin_of(source: Source, sources: Sequence[Source]) -> Disk | None:
    """The copy from which the blocks of an export are told."""
    if source.part.origin is Origin.EXPORT:
        return next(other.copy for other in sources if other.part.number == source.part.origin_number)
    return source.base
