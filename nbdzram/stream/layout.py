"""The records of a stream, to the byte: docs/reference/stream.md says the same for those who read it elsewhere.

    stream     magic 8 | version 4 | features 4 | record ...
    record     length of the body 4 | kind 2 | 0 2 | body | XXH3 of all before, seeded with the record's number 8

    HEADER                                            first
    POOL       number, name                           what follows is of this pool, up to the next one
      EXPORT     what it is, where its blocks begin from
      DICTIONARY   before the objects that need it
      OBJECTS      before the blocks that name them
      BLOCKS       of an export that was told
    END        counts, digest                         last

Everything is little endian. A text is its length in 2 bytes and UTF-8. This file knows no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.engine.codec import digest_of
from nbdzram.errors import StreamError, UnknownFormat

MAGIC = b"NBDZRAMS"
CONTINUATION_MAGIC = b"NBDZRAMC"
"""Of what goes on with a stream that was interrupted (position.py)."""
VERSION = 1
BOUNDED = 1
"""Of an export at least it says what that may take: a reader that does not know of it would offer it without."""
FEATURES = BOUNDED
"""Bits of what a reader must know beyond the version. Who writes sets those that the stream needs."""

PREAMBLE = struct.Struct("<8sII")
FRAME = struct.Struct("<IHH")
CHECKSUM = struct.Struct("<Q")
LARGEST_BODY = 1 << 20
"""Of a record: a reader makes room for one. Writers stay below 512 KiB."""

BLOCK_SIZE = 4096
IDENTITY_MAX = (1 << 48) - 1
EXPORTS_MAX = 65536
"""Of a stream: sixteen pools full of them."""
TEXTS_MAX = 1024
"""Rules of an export, of a kind; settings have fewer."""

Part = TypeVar("Part")


class Kind(IntEnum):
    """Of a record."""

    HEADER = 1
    POOL = 2
    EXPORT = 3
    DICTIONARY = 4
    OBJECTS = 5
    BLOCKS = 6
    END = 7


class Origin(IntEnum):
    """What an export is before its blocks are told."""

    HOLES = 0
    EXPORT = 1  # an earlier export of this pool in this stream, by its number
    BASE = 2  # a disk that the receiver has, by its identity


@dataclass(frozen=True, slots=True)
class Header:
    """What the stream is. `identity` names it; `moment_ns` since the epoch is when its copies were taken."""

    identity: bytes
    moment_ns: int
    pool_count: int
    export_count: int
    program: str


@dataclass(frozen=True, slots=True)
class PoolPart:
    """The pool whose exports follow."""

    number: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPart:
    """One export. `domain` 0 folds with all others of it, another number with those of this number alone."""

    number: int
    name: str
    size_bytes: int
    read_only: bool
    domain: int
    identity: int  # of its content, 0 if that may change
    origin: Origin
    origin_number: int
    origin_name: str  # for people
    description: str
    admits_nobody: bool
    addresses: tuple[str, ...]
    certificates: tuple[str, ...]
    bounds: Bounds = UNBOUND


@dataclass(frozen=True, slots=True)
class EndPart:
    """What there was; `digest` binds every record before."""

    exports: int
    objects: int
    object_bytes: int
    blocks: int
    records: int
    digest: int


class Cursor:
    """Takes a body apart. Raises StreamError where it ends early."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > len(self._body) - self._at:
            raise StreamError("the stream is damaged: a record ends in the middle of a field")
        self._at += count
        return self._body[self._at - count : self._at]

    def numbers(self, form: str) -> tuple[int, ...]:
        """The next numbers, by a form of `struct`."""
        taken: tuple[int, ...] = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))
        return taken

    def text(self) -> str:
        """The next text."""
        (length,) = self.numbers("H")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise StreamError("the stream is damaged: a text is not UTF-8") from None

    def texts(self) -> tuple[str, ...]:
        """The next list of texts."""
        (count,) = self.numbers("H")
        if count > TEXTS_MAX:
            raise StreamError(f"the stream is damaged: a list of {count} texts, of {TEXTS_MAX} at most")
        return tuple([self.text() for _ in range(count)])

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self._body) - self._at)

    def end(self) -> None:
        """There is to be nothing left."""
        if self._at != len(self._body):
            raise StreamError("the stream is damaged: a record has bytes behind its last field")


def text(value: str) -> bytes:
    """A text, as it stands in a body."""
    encoded = value.encode()
    return struct.pack("<H", len(encoded)) + encoded


def texts(values: Iterable[str]) -> bytes:
    """A list of texts."""
    encoded = [text(value) for value in values]
    return struct.pack("<H", len(encoded)) + b"".join(encoded)


def features_of(parts: Iterable[ExportPart]) -> int:
    """What a reader of a stream of these exports must know."""
    return BOUNDED if any(part.bounds != UNBOUND for part in parts) else 0


def preamble(features: int = 0) -> bytes:
    """What a stream begins with."""
    return PREAMBLE.pack(MAGIC, VERSION, features)


def check_preamble(found: bytes) -> None:
    """Whether this program knows the stream, and it is one from its beginning on. Raises StreamError."""
    magic, version, features = PREAMBLE.unpack(found)
    if magic == CONTINUATION_MAGIC:
        raise StreamError(
            "this goes on with a stream that was interrupted; `nbdzram receive` takes it where its first part is kept"
        )
    assert magic == MAGIC
    check_version(version, features)


def check_version(version: int, features: int) -> None:
    """Whether this program knows what was written so. Raises StreamError; UnknownFormat: it would be a later one."""
    if version != VERSION:
        refusal = UnknownFormat if version > VERSION else StreamError
        raise refusal(f"the stream has version {version}, this program reads {VERSION}; receive it with a later one")
    if features & ~FEATURES:
        raise UnknownFormat(
            f"the stream needs features that this program does not know (bits {features & ~FEATURES:#x}); receive it "
            "with a later one"
        )


def record(number: int, kind: Kind, *parts: bytes, salt: int = 0) -> tuple[bytes, int]:
    """A record as it stands in a stream, and its checksum; `salt` is that of a group of a journal (journal.py)."""
    length = sum(map(len, parts))
    assert length <= LARGEST_BODY, length
    framed = b"".join((FRAME.pack(length, kind, 0), *parts))
    checksum = digest_of(framed, seed_of(salt, number))
    return framed + CHECKSUM.pack(checksum), checksum


def seed_of(salt: int, number: int) -> int:
    """Of a record's checksum."""
    return salt + number & (1 << 64) - 1


def digest_on(digest: int, checksum: int) -> int:
    """The digest of all records up to one more."""
    return digest_of(CHECKSUM.pack(digest) + CHECKSUM.pack(checksum), 0)


def header_body(header: Header) -> bytes:
    """HEADER."""
    numbers = struct.pack("<QIII", header.moment_ns, BLOCK_SIZE, header.pool_count, header.export_count)
    return header.identity + numbers + text(header.program)


def read_header(body: memoryview) -> Header:
    """HEADER. Raises StreamError."""

    def read(cursor: Cursor) -> Header:
        identity = bytes(cursor.take(16))
        moment_ns, block_size, pool_count, export_count = cursor.numbers("QIII")
        if block_size != BLOCK_SIZE:
            raise UnknownFormat(f"the stream has blocks of {block_size} bytes; this program knows {BLOCK_SIZE}")
        return Header(identity, moment_ns, pool_count, export_count, cursor.text())

    return _whole(body, read)


def pool_body(part: PoolPart) -> bytes:
    """POOL."""
    return struct.pack("<I", part.number) + text(part.name)


def read_pool(body: memoryview) -> PoolPart:
    """POOL. Raises StreamError."""
    return _whole(body, lambda cursor: PoolPart(cursor.numbers("I")[0], cursor.text()))


READ_ONLY, ADMITS_NOBODY, HAS_BOUNDS = 1, 2, 4
EXPORT_FLAGS = READ_ONLY | ADMITS_NOBODY | HAS_BOUNDS


def export_body(part: ExportPart) -> bytes:
    """EXPORT."""
    bounded = part.bounds != UNBOUND
    flags = READ_ONLY * part.read_only | ADMITS_NOBODY * part.admits_nobody | HAS_BOUNDS * bounded
    numbers = (part.number, flags, part.domain, part.origin, part.size_bytes, part.identity, part.origin_number)
    names = text(part.name) + text(part.origin_name) + text(part.description)
    rules = texts(part.addresses) + texts(part.certificates)
    return struct.pack("<IIIIQQQ", *numbers) + names + rules + (_bounds_body(part.bounds) if bounded else b"")


def _bounds_body(bounds: Bounds) -> bytes:
    return struct.pack(
        "<QQQQQ",
        bounds.quota_bytes,
        bounds.iops,
        bounds.iops_burst,
        bounds.bandwidth_bytes,
        bounds.bandwidth_burst_bytes,
    )


def _read_bounds(cursor: Cursor) -> Bounds:
    quota_bytes, iops, iops_burst, bandwidth_bytes, bandwidth_burst_bytes = cursor.numbers("QQQQQ")
    return Bounds(
        quota_bytes=quota_bytes,
        iops=iops,
        iops_burst=iops_burst,
        bandwidth_bytes=bandwidth_bytes,
        bandwidth_burst_bytes=bandwidth_burst_bytes,
    )


def read_export(body: memoryview) -> ExportPart:
    """EXPORT. Raises StreamError."""

    def read(cursor: Cursor) -> ExportPart:
        number, flags, domain, origin, size_bytes, identity, origin_number = cursor.numbers("IIIIQQQ")
        name, origin_name, description = cursor.text(), cursor.text(), cursor.text()
        if flags & ~EXPORT_FLAGS or origin not in tuple(Origin) or identity > IDENTITY_MAX:
            raise StreamError(f"the stream is damaged: what it says of the export {name[:80]!r} makes no sense")
        return ExportPart(
            number=number,
            name=name,
            size_bytes=size_bytes,
            read_only=bool(flags & READ_ONLY),
            domain=domain,
            identity=identity,
            origin=Origin(origin),
            origin_number=origin_number,
            origin_name=origin_name,
            description=description,
            admits_nobody=bool(flags & ADMITS_NOBODY),
            addresses=cursor.texts(),
            certificates=cursor.texts(),
            bounds=_read_bounds(cursor) if flags & HAS_BOUNDS else UNBOUND,
        )

    return _whole(body, read)


def dictionary_head(number: int) -> bytes:
    """DICTIONARY, before its content."""
    return struct.pack("<I", number)


def objects_head(domain: int) -> bytes:
    """OBJECTS, before the objects (engine/walk.pyx)."""
    return struct.pack("<I", domain)


def blocks_head(export: int, first: int) -> bytes:
    """BLOCKS, before the runs (engine/walk.pyx)."""
    return struct.pack("<IIQ", export, 0, first)


def read_head(body: memoryview, form: str) -> tuple[tuple[int, ...], memoryview]:
    """The numbers that a body begins with, and the rest. Raises StreamError."""
    cursor = Cursor(body)
    return cursor.numbers(form), cursor.rest()


def end_body(part: EndPart) -> bytes:
    """END."""
    return struct.pack(
        "<IIQQQQQ", part.exports, 0, part.objects, part.object_bytes, part.blocks, part.records, part.digest
    )


def read_end(body: memoryview) -> EndPart:
    """END. Raises StreamError."""

    def read(cursor: Cursor) -> EndPart:
        exports, _, *rest = cursor.numbers("IIQQQQQ")
        return EndPart(exports, *rest)

    return _whole(body, read)


def _whole(body: memoryview, read: Callable[[Cursor], Part]) -> Part:
    cursor = Cursor(body)
    part = read(cursor)
    cursor.end()
    return part
