"""A disk reads back what was written, whatever the content, alignment and order."""

from __future__ import annotations

import pytest

from nbdzram.engine.disk import Extent
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.errors import ExportExists, PoolFull, UserError
from nbdzram.values import EXPORT_BYTES_MAX
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

SIZE = 8 << 20


def test_an_export_never_written_reads_as_zeroes_and_stores_nothing() -> None:
    pool = Pool()
    disk = pool.create("disk", 1 << 40)
    assert disk.read((1 << 40) - 10000, 10000) == bytes(10000)
    assert disk.stats().stored == 0
    assert pool.stats().mem_used_total == 0
    assert disk.extents(0, 1 << 40, 10) == [(1 << 40, Extent.HOLE | Extent.ZERO)]


@pytest.mark.parametrize(
    "block",
    [
        text(1),
        half_random(2),
        noise(3),
        bytes(BLOCK),
        b"\xff" * BLOCK,
        bytes.fromhex("0123456789abcdef") * 512,
        bytes.fromhex("efcdab8967452341") * 512,
        bytes.fromhex("00000000000000c0") * 512,
        bytes.fromhex("0000000000000040") * 512,
        bytes(BLOCK - 1) + b"x",
        b"x" + bytes(BLOCK - 1),
        bytes(2048) + b"x" + bytes(2047),
    ],
)
@pytest.mark.parametrize("offset", [0, BLOCK * 3, 512, 1, BLOCK - 3])
def test_every_kind_of_block_reads_back_at_every_alignment(block: bytes, offset: int) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, noise(99) * 6)
    disk.write(offset, block)
    expected = bytearray(noise(99) * 6)
    expected[offset : offset + BLOCK] = block
    assert disk.read(0, BLOCK * 6) == expected
    for start, length in ((1, 5), (offset + 7, 4000), (offset + 4093, 9)):
        assert disk.read(start, length) == expected[start : start + length]
    pool.check()


@pytest.mark.parametrize("offset", range(1, 9))
def test_whole_blocks_are_taken_from_any_address(offset: int) -> None:
    """A write that begins inside a block finds the next at odd addresses. The sanitizers' run looks at each load."""
    disk = Pool().create("disk", SIZE)
    blocks = noise(1) + text(2) + b"\x07" * BLOCK + half_random(3)
    disk.write(offset, blocks)
    assert disk.read(offset, len(blocks)) == blocks


def test_same_filled_blocks_take_no_object_and_count_as_stored() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for number, word in enumerate(("0000000000000000", "ffffffffffffffff", "0123456789abcdef", "00000000000000c0")):
        disk.write(number * BLOCK, bytes.fromhex(word) * 512)
    stats = pool.stats()
    assert (stats.same_pages, stats.orig_data_size, stats.objects) == (4, 4 * BLOCK, 0)
    assert stats.mem_used_total == 0
    disk.write(0, text(1) + text(2) + text(3) + text(4))
    assert pool.stats().same_pages == 0
    pool.check()


def test_a_block_that_does_not_compress_is_stored_raw_and_counted_huge() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, noise(1) + half_random(2))
    assert pool.stats().huge_pages == 1
    disk.write(0, text(1))
    assert (pool.stats().huge_pages, pool.stats().huge_pages_since) == (0, 1)


def test_trim_makes_holes_of_whole_blocks_only() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, noise(1) + noise(2) + noise(3))
    disk.trim(100, 2 * BLOCK)
    assert disk.read(0, 3 * BLOCK) == noise(1) + bytes(BLOCK) + noise(3)
    assert disk.stats().stored == 2 * BLOCK
    disk.trim(0, SIZE)
    assert pool.stats().orig_data_size == pool.stats().mem_used_total == pool.stats().handles == 0
    pool.check()


def test_zero_is_exact_to_the_byte_and_no_hole_keeps_blocks_stored() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    content = bytearray(b"".join(noise(number) for number in range(8)))
    disk.write(0, content)
    for offset, length, no_hole in ((5, 10, False), (BLOCK + 5, BLOCK * 2, False), (BLOCK * 5 - 1, BLOCK + 2, True)):
        disk.zero(offset, length, no_hole=no_hole)
        content[offset : offset + length] = bytes(length)
    assert disk.read(0, 8 * BLOCK) == content
    assert disk.extents(5 * BLOCK, BLOCK, 1) == [(BLOCK, Extent.ZERO | Extent.SAME_FILLED)]
    assert disk.extents(2 * BLOCK, BLOCK, 1) == [(BLOCK, Extent.ZERO | Extent.HOLE)]
    pool.check()


def test_extents_are_coalesced_clipped_and_limited() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(BLOCK, text(1) + text(2) + noise(3) + b"\x07" * BLOCK)
    hole = Extent.HOLE | Extent.ZERO
    runs = [(3000, hole), (2 * BLOCK, 0), (BLOCK, Extent.HUGE), (BLOCK, Extent.SAME_FILLED), (50, hole)]
    assert disk.extents(1096, 3000 + 4 * BLOCK + 50, 100) == runs
    assert disk.extents(1096, 3000 + 4 * BLOCK + 50, 2) == runs[:2]
    allocation = disk.extents(0, SIZE, 100, mask=hole)
    assert allocation == [(BLOCK, hole), (4 * BLOCK, 0), (SIZE - 5 * BLOCK, hole)]


def test_a_write_at_the_limit_is_refused_and_everything_stored_stays() -> None:
    pool = Pool(mem_limit=256 << 10)
    disk = pool.create("disk", SIZE)
    written = 0
    with pytest.raises(PoolFull, match="limit of 262144 bytes"):
        while True:
            disk.write(written * BLOCK, noise(written))
            written += 1
    assert disk.read(0, written * BLOCK) == b"".join(noise(number) for number in range(written))
    assert disk.read(written * BLOCK, BLOCK) == bytes(BLOCK)
    assert pool.stats().failed_writes == 1
    turns = pool.turns()
    assert pool.failed_writes == 1
    assert pool.turns() == turns, "who asks for this number alone takes no lock"
    assert pool.stats().memory_used <= pool.mem_limit
    disk.write(written * BLOCK, bytes(BLOCK))  # same-filled needs no memory
    disk.trim(0, BLOCK)
    disk.write(0, noise(100))
    pool.check()


def test_overwriting_a_shared_object_at_the_limit_keeps_both_sides() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(noise(number) for number in range(8)))
    twin = pool.clone(disk, "twin")
    pool.mem_limit = pool.stats().memory_used + 5 * BLOCK  # four for the twin's tables; one is kept for making room
    with pytest.raises(PoolFull):
        twin.write(0, noise(50))
    assert twin.read(0, BLOCK) == disk.read(0, BLOCK) == noise(0)
    disk.trim(BLOCK, BLOCK)  # still held by the twin: nothing is freed
    with pytest.raises(PoolFull):
        disk.write(BLOCK, noise(51))
    assert twin.read(BLOCK, BLOCK) == noise(1)
    twin.trim(BLOCK, BLOCK)
    disk.write(BLOCK, noise(51))
    pool.check()


def test_partial_write_at_the_limit_keeps_the_old_block() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, noise(1))
    pool.mem_limit = 1
    with pytest.raises(PoolFull):
        disk.write(10, b"changed")
    assert disk.read(0, BLOCK) == noise(1)


def test_memory_goes_back_when_blocks_go() -> None:
    pool = Pool()
    disk = pool.create("disk", 64 << 20)
    before = pool.stats().metadata
    for number in range(4096):
        disk.write(number * BLOCK, half_random(number))
    assert pool.stats().mem_used_total > 8 << 20
    disk.trim(0, 64 << 20)
    stats = pool.stats()
    assert (stats.mem_used_total, stats.zspages, stats.objects, stats.orig_data_size) == (0, 0, 0, 0)
    assert stats.metadata < before + (256 << 10)


def test_a_stored_block_costs_at_most_32_bytes_beside_its_object() -> None:
    pool = Pool()
    disk = pool.create("disk", 128 << 20)
    empty = pool.stats().metadata
    for number in range(32768):
        disk.write(number * BLOCK, number.to_bytes(4, "little") + half_random(number % 100, 700)[4:])
    stats = pool.stats()
    assert stats.objects == 32768
    assert stats.metadata - empty <= 32 * 32768


def test_request_past_the_end_is_a_caller_error() -> None:
    disk = Pool().create("disk", 10000)
    for call in (lambda: disk.read(9000, 1001), lambda: disk.write(10000, b"x"), lambda: disk.trim(0, 10001)):
        with pytest.raises(ValueError, match="past the end"):
            call()


def test_size_need_not_be_a_multiple_of_a_block() -> None:
    pool = Pool()
    disk = pool.create("disk", 10000)
    disk.write(8000, b"x" * 2000)
    assert disk.read(0, 10000) == bytes(8000) + b"x" * 2000
    assert disk.extents(0, 10000, 10)[-1] == (10000 - BLOCK, 0)


def test_resize_grows_with_zeroes_and_shrinks_for_good() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(noise(number) for number in range(16)))
    disk.resize(5 * BLOCK + 100)
    assert pool.stats().orig_data_size == 6 * BLOCK
    disk.resize(SIZE)
    assert disk.read(4 * BLOCK, 3 * BLOCK) == noise(4) + noise(5)[:100] + bytes(2 * BLOCK - 100)
    pool.check()


def test_names_are_unique_and_bounded() -> None:
    pool = Pool()
    pool.create("disk", SIZE)
    with pytest.raises(ExportExists, match="disk"):
        pool.create("disk", SIZE)
    with pytest.raises(UserError, match="at most 255"):
        pool.create("ä" * 128, SIZE)


def test_a_clone_is_free_writable_and_independent() -> None:
    pool = Pool()
    disk = pool.create("disk", 64 << 20)
    content = b"".join(half_random(number) for number in range(2048))
    disk.write(0, content)
    before = pool.stats()
    twin = pool.clone(disk, "twin", read_only=True)
    after = pool.stats()
    assert after.mem_used_total == before.mem_used_total
    assert after.metadata == before.metadata
    assert after.orig_data_size == 2 * before.orig_data_size
    assert twin.read_only
    disk.write(BLOCK * 7, noise(7))
    disk.trim(0, BLOCK)
    assert twin.read(0, len(content)) == content
    twin.write(BLOCK * 9, text(9))
    assert disk.read(BLOCK * 9, BLOCK) == half_random(9)
    pool.check()
    assert disk.usage().shared > 0
    pool.delete(disk)
    assert twin.read(0, BLOCK * 9) == content[: BLOCK * 9]
    assert twin.usage().shared == 0
    pool.check()
    pool.delete(twin)
    assert pool.stats().mem_used_total == pool.stats().handles == pool.stats().orig_data_size == 0
    pool.check()


@pytest.mark.parametrize("inline", [False, True])
def test_unique_is_what_removing_an_export_frees(inline: bool) -> None:
    """Whether its objects are its own, held by several of its blocks, by another export, or by a clone."""
    pool = Pool(inline_dedup=inline)
    contents = {
        "alone": [text(number) for number in range(40)] * 3 + [noise(number) for number in range(10)],
        "overlapping": [text(number) for number in range(30, 60)] * 2 + [bytes(BLOCK)],
        "many": [text(7)] * 600 + [half_random(1)] * 600,  # more holders than a cell counts
    }
    for name, blocks in contents.items():
        pool.create(name, 64 << 20).write(0, b"".join(blocks))
    run(Fold(pool))
    clone = pool.clone(pool.disks()[0], "clone")
    clone.write(5 * BLOCK, half_random(5) * 2 + text(9))
    run(Fold(pool))
    while disks := pool.disks():
        usage, before = disks[0].usage(), pool.stats().compr_data_size
        pool.delete(disks[0])
        assert usage.unique == before - pool.stats().compr_data_size, disks[0].name
        assert usage.shared == usage.compressed - usage.unique


def test_clones_of_clones_share_until_the_last_is_gone() -> None:
    pool = Pool()
    disks = [pool.create("disk0", 64 << 20)]
    disks[0].write(0, b"".join(half_random(number) for number in range(1024)))
    for number in range(1, 6):
        disks.append(pool.clone(disks[-1], f"disk{number}"))
        disks[-1].write(number * BLOCK, noise(number))
    for number in (3, 0, 5, 1):
        pool.delete(disks[number])
        pool.check()
    assert disks[4].read(0, 6 * BLOCK) == half_random(0) + b"".join(noise(n) for n in range(1, 5)) + half_random(5)
    assert disks[2].read(2 * BLOCK, 2 * BLOCK) == noise(2) + half_random(3)


def test_more_sharers_than_a_cell_can_count() -> None:
    pool = Pool(inline_dedup=True)
    disk = pool.create("disk", 64 << 20)
    for number in range(2000):
        disk.write(number * BLOCK, text(1))
    stats = pool.stats()
    assert (stats.objects, stats.shared_objects, stats.handles) == (1, 1, 1)
    assert stats.shared_bytes == 1999 * stats.compr_data_size
    pool.check()
    for number in range(1999):
        disk.write(number * BLOCK, noise(number % 7))
    assert disk.read(1999 * BLOCK, BLOCK) == text(1)
    pool.check()


def test_inline_deduplication_stores_a_known_block_once() -> None:
    pool = Pool(inline_dedup=True)
    disk = pool.create("disk", SIZE)
    for number in range(100):
        disk.write(number * BLOCK, half_random(number % 10))
    stats = pool.stats()
    assert (stats.objects, stats.inline_folded, stats.fold_pending) == (10, 90, 0)
    assert disk.read(0, 100 * BLOCK) == b"".join(half_random(number % 10) for number in range(100))
    pool.check()


@pytest.mark.parametrize("known", [half_random(1), noise(1)], ids=["compressed", "raw"])
def test_inline_deduplication_trusts_no_fingerprint(known: bytes) -> None:
    """All blocks have one fingerprint, as a hostile client would arrange it: what is equal shares, nothing else."""
    pool = Pool(inline_dedup=True, fingerprint_mask=0)
    disk = pool.create("disk", SIZE)
    disk.write(0, known)
    others = [half_random(2), noise(2), known[:-1] + b"x"]
    blocks = [others[0], known, others[1], b"8 bytes." * 512, known, others[2], known, others[0], known, others[1]]
    disk.write(BLOCK, b"".join(blocks))
    assert disk.read(0, 11 * BLOCK) == known + b"".join(blocks)
    assert pool.stats().inline_folded == 4
    pool.check()


def test_a_disk_is_as_large_as_the_configuration_allows_and_no_larger() -> None:
    with Pool() as pool:
        assert pool.create("largest", EXPORT_BYTES_MAX).size_bytes == EXPORT_BYTES_MAX
        with pytest.raises(UserError, match="is outside"):
            pool.create("larger", EXPORT_BYTES_MAX + 4096)
