"""What becomes of a stream in which one thing is not as it should be, under checksums that are right: bent.txt has it.

python -m tests.unit.stream.test_bent        writes it anew, after a change that is meant
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nbdzram.bounds import Bounds
from nbdzram.engine import moment
from nbdzram.engine.pool import Pool
from nbdzram.errors import StreamCut, StreamError, UserError
from nbdzram.stream import layout
from nbdzram.stream.layout import ExportPart, Header, Kind, Origin
from nbdzram.stream.position import Position, continuation, read_identity, read_token
from nbdzram.stream.reading import Counted, opening, records
from nbdzram.stream.receiving import Intake
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.stream.roads import begun, receiver_in
from tests.unit.stream.test_streams import forged

BENT = Path(__file__).with_name("bent.txt")
SIZE = 3 * BLOCK
WORD = 4
LOOKED_AT_BYTES = 72
OF_OBJECTS = 20
"""Of a body: the fields before its texts, objects or runs, and the first of those."""

Record = tuple[int, bytes]


def genuine() -> list[Record]:
    """The records of a stream that has a disk, a clone of it and a private one; the END has no count and digest."""
    with Pool() as pool:
        disk = pool.create("disk", SIZE)
        disk.write(
            0, noise(1) + noise(2) + b"8 bytes!" * 512
        )  # whose objects are the same whatever LZ4 makes of others
        clone = pool.clone(disk, "clone")
        clone.write(BLOCK, bytes(BLOCK))
        mine = pool.create("mine", SIZE, private=True)
        mine.write(0, noise(3))
        out = io.BytesIO()
        with begun(disk, clone, mine, origins={"clone": 0}, domains={"mine": 1}) as sending:
            sending.write_to(out.write)  # type: ignore[arg-type]
    stream, found, at = out.getvalue(), [], layout.PREAMBLE.size
    while at < len(stream):
        length, kind, _ = layout.FRAME.unpack_from(stream, at)
        body = stream[at + layout.FRAME.size : at + layout.FRAME.size + length]
        found.append((kind, body[:-16] if kind == Kind.END else body))
        at += layout.FRAME.size + length + layout.CHECKSUM.size
    (_, header), *rest = found
    return [(Kind.HEADER, bytes(range(16)) + header[16:]), *rest]


def bends(genuine: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Each one thing that is otherwise."""
    for at, (kind, body) in enumerate(genuine):
        before, behind = genuine[:at], genuine[at + 1 :]
        name = f"{at} {Kind(kind).name}"
        yield f"{name} left out", [*before, *behind]
        yield f"{name} twice", [*before, (kind, body), (kind, body), *behind]
        yield f"{name} last", [*before, *behind, (kind, body)]
        yield f"{name} later", [*before, *behind[:1], (kind, body), *behind[1:]]
        if kind != Kind.END:
            yield f"{name} a byte shorter", [*before, (kind, body[:-1]), *behind]
            yield f"{name} a byte longer", [*before, (kind, body + b"\0"), *behind]
            yield f"{name} empty", [*before, (kind, b""), *behind]
        for word in range(0, min(len(body) - WORD + 1, OF_OBJECTS if kind == Kind.OBJECTS else LOOKED_AT_BYTES), WORD):
            (number,) = struct.unpack_from("<I", body, word)
            for other in sorted({(number + 1) & 0xFFFFFFFF, 0, 0xFFFFFFFF} - {number}):
                bent = body[:word] + struct.pack("<I", other) + body[word + WORD :]
                yield f"{name} at {word}: {number if word > 3 else '-'} is {other}", [*before, (kind, bent), *behind]


def received(stream: bytes) -> str:
    """What a pool has of it, or the sentence, and that nothing stays."""
    with Pool() as pool:
        intake = Intake()
        try:
            disks = receiver_in(pool, intake=intake).receive(io.BytesIO(stream).read)
        except UserError as error:
            assert pool.all_disks() == []
            return f"{type(error).__name__}: {error}"
        told = []
        for one in disks:
            content = one.disk.read(0, min(one.disk.size_bytes, SIZE))
            blocks = [KNOWN.get(content[at : at + BLOCK], "?") for at in range(0, len(content), BLOCK)]
            told.append(f"{one.name[:40]} {one.disk.size_bytes} {blocks} {one.disk.read_only:d} {one.disk.identity}")
        moment.discard([one.disk for one in disks])
        pool.check()
        return f"{intake.exports} {intake.objects} {intake.objects_folded} {intake.blocks}: {'; '.join(told)}"


KNOWN = {noise(1): "1", noise(2): "2", noise(3): "3", b"8 bytes!" * 512: "word", bytes(BLOCK): "0"}


def cuts(stream: bytes) -> Iterator[str]:
    """Of the bytes themselves: cut off, changed, with something behind."""
    ends = [0, 8, layout.PREAMBLE.size]
    while ends[-1] < len(stream):
        length, _, _ = layout.FRAME.unpack_from(stream, ends[-1])
        ends.append(ends[-1] + layout.FRAME.size + length + layout.CHECKSUM.size)
    for number, end in enumerate(ends):
        for length in sorted({max(end - 1, 0), end, end + 7, end + 9} & set(range(len(stream)))):
            yield f"{number} ends, {length - end} bytes behind: {read(stream[:length])}"
        if end < len(stream):
            for place in (0, 3, 4, 6, 8):
                changed = stream[: end + place] + bytes([stream[end + place] ^ 1]) + stream[end + place + 1 :]
                yield f"a bit behind end {number}, at {place}: {read(changed)}"
    yield f"something behind it: {read(stream + b'x')}"
    yield f"that is not the last: {read(stream + b'x', alone=False)}"
    yield f"with a salt: {read(stream, salt=1)}"
    for version, features in ((0, 0), (2, 0), (1, 1), (1, 2), (1, 3), (1, 1 << 31)):
        opened = layout.PREAMBLE.pack(layout.MAGIC, version, features) + stream[16:]
        yield f"version {version}, features {features}: {read(opened)}"
    too_long = layout.FRAME.pack(layout.LARGEST_BODY + 1, 1, 0)
    yield f"a body that is too long: {read(stream[:16] + too_long + bytes(layout.LARGEST_BODY + 9))}"


def read(stream: bytes, *, alone: bool = True, salt: int = 0) -> str:
    counted = Counted()
    try:
        kinds = [kind.name for kind, _ in records(io.BytesIO(stream).read, counted, alone=alone, salt=salt)]
    except StreamError as error:
        return f"{counted.records} records, {counted.bytes_read} bytes, {type(error).__name__}: {error}"
    return f"{kinds} {counted.bytes_read == len(stream)}"


PARTS: dict[str, tuple[bytes, Callable[[memoryview], object]]] = {
    "header": (layout.header_body(Header(bytes(range(16)), 2**63 + 5, 7, 9, "prögram")), layout.read_header),
    "pool": (layout.pool_body(layout.PoolPart(2**32 - 1, "a pool")), layout.read_pool),
    "end": (layout.end_body(layout.EndPart(3, 5, 2**40, 11, 13, 2**64 - 1)), layout.read_end),
}
EXPORT = ExportPart(
    number=3, name="näme", size_bytes=2**51, read_only=True, domain=5, identity=7, origin=Origin.BASE, origin_number=11,
    origin_name="origin", description="for people", admits_nobody=False, addresses=("::1/128", "10.0.0.0/8"),
    certificates=("one",),
    bounds=Bounds(quota_bytes=13, iops=17, iops_burst=19, bandwidth_bytes=23, bandwidth_burst_bytes=29),
)  # fmt: skip
EXPORTS = (
    EXPORT,
    replace(EXPORT, read_only=False, admits_nobody=True, addresses=(), certificates=()),
    replace(EXPORT, bounds=Bounds(), origin=Origin.HOLES, identity=layout.IDENTITY_MAX, description="", origin_name=""),
    replace(EXPORT, origin=Origin.EXPORT, certificates=("c",) * layout.TEXTS_MAX, addresses=("a",) * layout.TEXTS_MAX),
    replace(EXPORT, certificates=("c",) * (layout.TEXTS_MAX + 1)),
    replace(EXPORT, identity=layout.IDENTITY_MAX + 1),
)
TOKEN = Position(bytes(range(16)), 19, 2**64 - 2).token
TOKENS = (
    TOKEN,
    f" {TOKEN}\n",
    TOKEN.upper(),
    TOKEN[1:],
    TOKEN[:-1],
    f"{TOKEN}0",
    TOKEN.replace("-19-", "--"),
    TOKEN[:32],
    "",
    "x" * 200,
)


def parts() -> Iterator[str]:
    """How each record's fields lie, and that they are read as they were written."""
    for name, (body, reader) in PARTS.items():
        yield f"{name}: {body.hex(' ', 4)} {reader(memoryview(body))}"
        for wrong in (body[:-1], body + b"\0", body[:5]):
            yield f"  {len(wrong)} bytes: {tried(reader, wrong)}"
    for export in EXPORTS:
        body = layout.export_body(export)
        told = tried(layout.read_export, body)
        yield f"export, {len(body)} bytes: {'the same' if told == repr(export) else told} {body[:64].hex(' ', 4)}"
        features = layout.features_of([EXPORTS[2], export])
        yield f"  features {features}: {layout.preamble(features).hex(' ', 4)}"
    for wrong in (struct.pack("<I", 8), struct.pack("<IIII", 0, 0, 0, 3)):
        body = layout.export_body(EXPORT)
        yield f"export with {wrong.hex()}: {tried(layout.read_export, body[:4] + wrong[4:] + body[len(wrong) :])}"
    other_blocks = PARTS["header"][0].replace(struct.pack("<I", BLOCK), struct.pack("<I", 2 * BLOCK))
    yield f"header of other blocks: {tried(layout.read_header, other_blocks)}"
    yield f"a text that is none: {tried(layout.read_pool, bytes(4) + bytes([1, 0, 255]))}"
    yield f"seeds: {layout.seed_of(2**64 - 1, 3)} {layout.seed_of(5, 3)}"
    yield f"digests: {layout.digest_on(1, 2)} {layout.digest_on(2, 1)}"
    for head in (layout.dictionary_head(3), layout.objects_head(5), layout.blocks_head(7, 2**33)):
        yield f"head: {head.hex(' ', 4)}"


def tried(reader: Callable[[memoryview], object], body: bytes) -> str:
    try:
        return repr(reader(memoryview(body)))
    except StreamError as error:
        return f"refused: {error}"


def positions() -> Iterator[str]:
    """Tokens, and the heads of what goes on."""
    for token in TOKENS:
        for reader in (read_token, read_identity):
            try:
                yield f"{reader.__name__} {token[:80]!r}: {reader(token)!r}"
            except StreamError as error:
                yield f"{reader.__name__} {token[:80]!r}: refused: {error}"
    head = continuation(Position(bytes(range(16)), 19, 7), 1)
    yield f"continuation: {head.hex(' ', 8)}"
    spoilt = [head[:at] + bytes([head[at] ^ 1]) + head[at + 1 :] for at in range(0, len(head), 4)]
    unknown = layout.PREAMBLE.pack(layout.CONTINUATION_MAGIC, 1, 2) + head[16:]
    for sent in (head, head[:-1], head[:20], *spoilt, unknown, layout.preamble(), layout.preamble(2)):
        try:
            yield f"  {len(sent)} bytes: {opening(io.BytesIO(sent).read)}"
        except StreamCut as error:
            yield f"  {len(sent)} bytes: cut: {error}"
        except StreamError as error:
            yield f"  {len(sent)} bytes: refused: {error}"


def lines() -> Iterator[str]:
    found = genuine()
    yield f"as it was: {received(forged(*found))}"
    for what, bent in bends(found):
        yield f"{what}: {received(forged(*bent))}"
    yield "-- bytes"
    yield from cuts(forged(*found))
    yield "-- parts"
    yield from parts()
    yield "-- positions"
    yield from positions()


def test_each_stream_is_received_or_refused_as_it_was() -> None:
    assert list(lines()) == BENT.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    BENT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
