"""A reader of streams that was written from docs/reference/stream.md alone: it knows nothing of nbdzram's code.

    contents(stream, bases) -> {name: bytes}
    contents(joined(cut, continuation, ...))

It needs the public packages lz4, xxhash and zstandard, and as much memory as the disks are large.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import lz4.block
import xxhash
import zstandard

BLOCK = 4096
BOUNDED = 1
HEADER, POOL, EXPORT, DICTIONARY, OBJECTS, BLOCKS, END = range(1, 8)


class NotAStreamError(Exception):
    """It is not what the page says."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise NotAStreamError(what)


class Fields:
    """A body, from its beginning to its end."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def take(self, count: int) -> bytes:
        require(self.at + count <= len(self.body), "a field is cut off")
        self.at += count
        return self.body[self.at - count : self.at]

    def number(self, form: str) -> int:
        found: int = struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]
        return found

    def u16(self) -> int:
        return self.number("H")

    def u32(self) -> int:
        return self.number("I")

    def u64(self) -> int:
        return self.number("Q")

    def text(self) -> str:
        return self.take(self.u16()).decode("utf-8")

    def texts(self) -> list[str]:
        return [self.text() for _ in range(self.u16())]

    @property
    def more(self) -> bool:
        return self.at < len(self.body)


def records(stream: bytes) -> Iterator[tuple[int, Fields]]:
    """Kind and body of each record, all held against what the page says of them."""
    require(stream[:8] == b"NBDZRAMS", "the magic")
    version, features = struct.unpack("<II", stream[8:16])
    require(version == 1 and features & ~BOUNDED == 0, "version and features")
    at, number, digest, kind = 16, 0, 0, 0
    while kind != END:
        require(at + 8 <= len(stream), "the end record is missing")
        length, kind, nothing = struct.unpack("<IHH", stream[at : at + 8])
        require(length <= 1 << 20 and nothing == 0, "a record's head")
        behind = at + 8 + length
        require(behind + 8 <= len(stream), "a record is cut off")
        (checksum,) = struct.unpack("<Q", stream[behind : behind + 8])
        require(xxhash.xxh3_64_intdigest(stream[at:behind], seed=number) == checksum, "a checksum")
        require((kind == HEADER) == (number == 0), "the header comes first")
        body = Fields(stream[at + 8 : behind])
        if kind == END:
            require(struct.unpack("<QQ", body.body[-16:]) == (number, digest), "the digest")
        yield kind, body
        digest = xxhash.xxh3_64_intdigest(struct.pack("<QQ", digest, checksum), seed=0)
        number, at = number + 1, behind + 8
    require(at == len(stream), "nothing follows the end")


class Pool:
    """Objects and dictionaries of one pool."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.objects: dict[int, bytes] = {}
        self.dictionaries: dict[int, bytes] = {}

    def read_objects(self, fields: Fields) -> None:
        fields.u32()
        while fields.more:
            number, length, encoding, nothing = fields.u32(), fields.u16(), fields.number("B"), fields.number("B")
            hashed, encoded = fields.u64(), fields.take(length)
            require(nothing == 0 and number not in self.objects, "an object's head")
            block = self.decode(encoding, encoded)
            require(len(block) == BLOCK and xxhash.xxh3_64_intdigest(block, seed=0) == hashed, "an object's content")
            self.objects[number] = block

    def decode(self, encoding: int, encoded: bytes) -> bytes:
        if encoding == 1:
            return encoded
        if encoding == 2:
            return bytes(lz4.block.decompress(encoded, uncompressed_size=BLOCK))
        dictionary = None
        if encoding != 3:
            content = self.dictionaries[encoding - 4]
            dictionary = zstandard.ZstdCompressionDict(content)
        frames = zstandard.ZstdDecompressor(dict_data=dictionary, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        return frames.decompress(encoded, max_output_size=BLOCK)


class Export:
    """One disk, as its blocks come."""

    content: bytearray

    def __init__(self, fields: Fields, exports: list[Export], bases: Mapping[int, bytes]) -> None:
        self.number, self.flags, self.domain, origin = (fields.u32() for _ in range(4))
        self.size, self.identity, of = fields.u64(), fields.u64(), fields.u64()
        self.name, self.origin_name, self.description = fields.text(), fields.text(), fields.text()
        self.addresses, self.certificates = fields.texts(), fields.texts()
        self.bounds = [fields.u64() for _ in range(5)] if self.flags & 4 else [0] * 5
        require(not fields.more and self.number == len(exports) and origin <= 2, "an export")
        before: bytes | bytearray = b"" if origin == 0 else exports[of].content if origin == 1 else bases[of]
        room = -(-self.size // BLOCK) * BLOCK
        self.content = bytearray(before[: self.size].ljust(room, b"\0"))

    def read_blocks(self, fields: Fields, objects: Mapping[int, bytes]) -> int:
        require(fields.u32() == 0, "blocks")
        block, told = fields.u64(), 0
        while fields.more:
            kind, count = fields.u16(), fields.u16()
            require(kind <= 3 and (block + count) * BLOCK <= len(self.content), "a run")
            for index in range(block, block + count):
                if kind == 3:
                    self.put(index, objects[fields.u32()])
            if kind in {1, 2}:
                word = fields.take(8) if kind == 2 else bytes(8)
                for index in range(block, block + count):
                    self.put(index, word * (BLOCK // 8))
            told += count if kind else 0
            block += count
        return told

    def put(self, block: int, content: bytes) -> None:
        self.content[block * BLOCK : (block + 1) * BLOCK] = content


def joined(first: bytes, *continuations: bytes) -> bytes:
    """The stream that was cut off behind `first`, and went on."""
    for continuation in continuations:
        require(continuation[:8] == b"NBDZRAMC", "the magic of a continuation")
        require(continuation[8:16] == first[8:16], "version and features")
        count, digest, checksum = struct.unpack("<QQQ", continuation[32:56])
        require(xxhash.xxh3_64_intdigest(continuation[:48], seed=0) == checksum, "the head's checksum")
        end, found = whole_records(first, count)
        require(first[24:40] == continuation[16:32], "it goes on with another stream")
        require(found == digest, "it goes on behind other records")
        first = first[:end] + continuation[56:]
    return first


def whole_records(stream: bytes, count: int) -> tuple[int, int]:
    """Where the first so many records end, and their digest."""
    at, digest = 16, 0
    for _ in range(count):
        require(at + 8 <= len(stream), "it goes on behind what did not come")
        behind = at + 8 + struct.unpack("<I", stream[at : at + 4])[0]
        require(behind + 8 <= len(stream), "it goes on behind what did not come")
        digest = xxhash.xxh3_64_intdigest(struct.pack("<Q", digest) + stream[behind : behind + 8], seed=0)
        at = behind + 8
    return at, digest


def exports_of(stream: bytes, bases: Mapping[int, bytes] | None = None) -> list[Export]:
    """Every export of a stream; `bases` by their identities. Raises NotAStreamError."""
    exports: list[Export] = []
    pools: list[Pool] = []
    blocks = 0
    expected = (0, 0)
    for kind, fields in records(stream):
        if kind == HEADER:
            fields.take(16), fields.u64()
            require(fields.u32() == BLOCK, "the block's size")
            expected = fields.u32(), fields.u32()
            fields.text()
        elif kind == POOL:
            require(fields.u32() == len(pools), "a pool's number")
            pools.append(Pool(fields.text()))
        elif kind == EXPORT:
            exports.append(Export(fields, exports, bases or {}))
        elif kind == DICTIONARY:
            number = fields.u32()
            pools[-1].dictionaries[number] = fields.take(len(fields.body) - 4)
        elif kind == OBJECTS:
            pools[-1].read_objects(fields)
        elif kind == BLOCKS:
            blocks += exports[fields.u32()].read_blocks(fields, pools[-1].objects)
        else:
            require(kind == END, "a kind of record")
            count, nothing, objects = fields.u32(), fields.u32(), fields.u64()
            require((len(pools), count) == expected and nothing == 0, "the counts of the header")
            require(count == len(exports), "the count of exports")
            require(objects == sum(len(pool.objects) for pool in pools), "the count of objects")
            fields.u64()
            require(fields.u64() == blocks, "the count of blocks")
    return exports


def contents(stream: bytes, bases: Mapping[int, bytes] | None = None) -> dict[str, bytes]:
    """What each export holds, by its name."""
    return {export.name: bytes(export.content[: export.size]) for export in exports_of(stream, bases)}
