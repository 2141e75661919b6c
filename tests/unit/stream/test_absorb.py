"""What a stream brings along is stored as a write would store it, and what the pool has already is found; and it brings
the longest of runs."""

from __future__ import annotations

import mmap
import random
import struct
from pathlib import Path

import pytest
import zstandard

from nbdzram.engine import codec, moment
from nbdzram.engine.absorb import Absorber
from nbdzram.engine.arena import allocations_left, fail_allocation
from nbdzram.engine.dictionary import dictionary_of
from nbdzram.engine.disk import Extent
from nbdzram.engine.pool import HUGE_THRESHOLD, Pool
from nbdzram.errors import EngineError
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random
from tests.unit.stream.roads import revealed, sent

MIB = 1 << 20
LZ4, ZSTD_WITH_THE_FIRST = 2, 4  # as a stream has it
UNIT = 64 << 10
LONGEST = 0xFFFF  # blocks of a run


def encoded_in(length: int) -> bytes:
    """A block whose LZ4 encoding has this length."""
    blocks = (half_random(length, number) for number in range(length - 40, length))
    return next(block for block in blocks if len(codec.compress_lz4(block)) == length)


@pytest.mark.parametrize("length", [HUGE_THRESHOLD - 1, HUGE_THRESHOLD, HUGE_THRESHOLD + 1])
def test_what_came_encoded_is_stored_raw_from_the_length_on_from_which_a_write_stores_it_so(
    pool: Pool, other: Pool, length: int
) -> None:
    block = encoded_in(length)
    encoded = codec.compress_lz4(block)
    staging, absorber = moment.prepare(other, "\nstaging", MIB), Absorber(other)
    absorber.take_objects(staging, struct.pack("<IHBBQ", 0, length, LZ4, 0, codec.fingerprint_of(block)) + encoded)
    pool.create("disk", MIB).write(0, block)
    assert other.stats().compr_by_codec == pool.stats().compr_by_codec
    assert other.stats().huge_pages == pool.stats().huge_pages == (length >= HUGE_THRESHOLD)
    assert staging.read(0, len(block)) == block


def kept(pool: Pool) -> list[bytes]:
    """The pool's dictionaries."""
    found = []
    for number in range(4):
        try:
            found.append(dictionary_of(pool, number))
        except EngineError:
            break
    return found


def test_dictionaries_that_begin_alike_are_several_and_each_is_found_again(other: Pool) -> None:
    content = random.Random(1).randbytes(UNIT)
    alike = [content, content[:-1], content[: UNIT // 2], content[:-1] + bytes([content[-1] ^ 1])]
    for absorber in (Absorber(other), Absorber(other)):
        for number, one in enumerate(alike):
            absorber.dictionary(number, one)
    assert kept(other) == alike


@pytest.mark.parametrize("length", [UNIT, UNIT + 1])
def test_a_dictionary_that_finds_no_memory_takes_none(other: Pool, length: int) -> None:
    """Whichever allocation fails; its objects are encoded again then."""
    content, failures = random.Random(1).randbytes(length), 0
    before = other.stats().metadata
    while True:
        fail_allocation(failures)
        Absorber(other).dictionary(0, content)
        if allocations_left() >= 0:
            break
        assert kept(other) == []
        assert other.stats().metadata == before
        other.check()
        failures += 1
    fail_allocation(-1)
    assert failures > 1
    assert kept(other) == [content]
    assert other.stats().metadata == before + 2 * -(-length // 4096) * 4096  # once as it came, and once to be read with


@pytest.mark.parametrize("blocks", [LONGEST - 1, LONGEST, LONGEST + 1])
@pytest.mark.parametrize("gap", [LONGEST - 1, LONGEST, LONGEST + 1])
def test_runs_as_long_as_can_be_told_and_longer_arrive_whole(pool: Pool, other: Pool, blocks: int, gap: int) -> None:
    disk = pool.create("disk", 3 * (LONGEST + 1) * BLOCK)
    disk.zero(0, blocks * BLOCK, no_hole=True)
    disk.write((blocks + gap) * BLOCK, half_random(1))
    arrived = revealed(other, sent(disk))["disk"]
    mask = Extent.HOLE | Extent.SAME_FILLED
    told = [one.extents(0, one.size_bytes, 16, mask) for one in (disk, arrived)]
    assert told[0] == told[1]
    assert [length for length, _ in told[1][:2]] == [blocks * BLOCK, gap * BLOCK]


def test_what_only_a_dictionary_makes_short_is_stored_raw_where_there_is_no_place_for_that(other: Pool) -> None:
    """It is encoded again then, which makes nothing of it."""
    contents = [random.Random(number).randbytes(UNIT) for number in range(5)]
    for one in contents[:4]:
        Absorber(other).dictionary(0, one)
    own, block = contents[4], contents[4][1000 : 1000 + BLOCK]
    form = zstandard.ZstdCompressionParameters.from_level(
        3, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False, write_dict_id=False
    )
    encoded = zstandard.ZstdCompressor(
        dict_data=zstandard.ZstdCompressionDict(own, dict_type=zstandard.DICT_TYPE_RAWCONTENT), compression_params=form
    ).compress(block)
    assert len(encoded) < 100
    staging, absorber = moment.prepare(other, "\nstaging", MIB), Absorber(other)
    absorber.dictionary(0, own)
    head = struct.pack("<IHBBQ", 0, len(encoded), ZSTD_WITH_THE_FIRST, 0, codec.fingerprint_of(block))
    absorber.take_objects(staging, head + encoded)
    assert (absorber.objects_encoded_again, other.stats().huge_pages) == (1, 1)
    assert staging.read(0, BLOCK) == block


def test_of_what_a_base_held_nobody_knows_where_its_entry_is_not_right(tmp_path: Path, other: Pool) -> None:
    """Here one that says, but for its check, that nothing changed."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", MIB)
        disk.write(0, half_random(1) + half_random(2))
        base = pool.clone(disk, "base", read_only=True)
        base.identify(7)
        revealed(other, sent(base))
        disk.write(0, half_random(3))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            now, then = (arena.word_at(0, export=export) for export in (0, 1))
            arena.set_word(then, arena.word(now) >> 32 << 32 | arena.word(then) & 0xFFFFFFFF)
        arrived = revealed(other, sent(disk, bases={"disk": base}))["disk"]
    assert arrived.read(0, 2 * BLOCK) == half_random(3) + half_random(2)
