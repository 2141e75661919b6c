"""Whatever the records of a stream say, under checksums that are right, it is received or refused in a sentence."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdzram.engine import moment
from nbdzram.engine.pool import Pool
from nbdzram.errors import StreamError, UserError
from nbdzram.stream import layout
from tests.unit.engine.blocks import BLOCK, half_random, noise, text
from tests.unit.stream.roads import receive, receiver_in_pools, sent, sent_from_pools
from tests.unit.stream.test_streams import forged

SIZE = 64 * BLOCK


def genuine() -> list[tuple[int, bytes]]:
    """The records of a stream that has one of each kind."""
    with Pool() as pool:
        disk = pool.create("disk", SIZE)
        disk.write(0, text(1) + noise(2) + half_random(3) + b"8 bytes!" * 512)
        clone = pool.clone(disk, "clone")
        clone.write(BLOCK, bytes(BLOCK))
        stream = sent(disk, clone, origins={"clone": 0})
    found, at = [], layout.PREAMBLE.size
    while at < len(stream):
        length, kind, _ = layout.FRAME.unpack_from(stream, at)
        found.append((kind, stream[at + layout.FRAME.size : at + layout.FRAME.size + length]))
        at += layout.FRAME.size + length + layout.CHECKSUM.size
    return found


GENUINE = genuine()
ENDLESS = [(kind, body[:-16] if kind == layout.Kind.END else body) for kind, body in GENUINE]


@st.composite
def bent(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Those records with some left out, moved, doubled, or with fields of their own."""
    records = list(ENDLESS)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(records) - 1))
        kind, body = records[place]
        what = draw(st.sampled_from(["leave out", "double", "move", "cut", "byte", "number", "kind"]))
        if what == "leave out" and len(records) > 1:
            del records[place]
        elif what == "double":
            records.insert(place, (kind, body))
        elif what == "move":
            records.insert(draw(st.integers(0, len(records) - 1)), records.pop(place))
        elif what == "cut":
            records[place] = (kind, body[: draw(st.integers(0, len(body)))])
        elif what == "byte" and body:
            at = draw(st.integers(0, len(body) - 1))
            records[place] = (kind, body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :])
        elif what == "number" and len(body) >= 8:
            at = draw(st.integers(0, min(len(body) - 8, 80)))
            value = draw(st.sampled_from([0, 1, 255, 65535, 1 << 31, (1 << 48) - 1, (1 << 64) - 1]))
            records[place] = (kind, body[:at] + struct.pack("<Q", value) + body[at + 8 :])
        elif what == "kind":
            records[place] = (draw(st.integers(1, 7)), body)
    return records


def test_two_exports_of_one_name_are_refused_also_where_they_lie_in_two_pools() -> None:
    """A server has each name once: of two one would be offered, and be gone with the other."""
    with Pool() as one, Pool() as other:
        stream = sent_from_pools(*(pool.create("disk", SIZE) for pool in (one, other)))
    with Pool() as one, Pool() as other:
        with pytest.raises(StreamError, match="it has two exports 'disk'"):
            receiver_in_pools(one, other).receive(io.BytesIO(stream).read)
        assert one.all_disks() + other.all_disks() == []


@settings(max_examples=400, deadline=None)
@given(records=bent())
def test_a_forgery_is_received_or_refused_and_leaves_nothing_half(records: list[tuple[int, bytes]]) -> None:
    with Pool() as pool:
        try:
            received = receive(pool, forged(*records))
        except UserError:
            assert pool.all_disks() == []
        else:
            assert len(received) == len(pool.all_disks())
            for disk in pool.all_disks():
                disk.read(0, min(disk.size_bytes, SIZE))
            moment.discard([found.disk for found in received])
        pool.check()
        assert pool.stats().objects == 0


@settings(max_examples=300, deadline=None)
@given(stream=st.binary(max_size=200))
def test_any_bytes_are_refused_in_a_sentence(stream: bytes) -> None:
    with Pool() as pool:
        for begin in (b"", layout.preamble()):
            try:
                receive(pool, begin + stream)
            except UserError:
                continue
            raise AssertionError("received")
