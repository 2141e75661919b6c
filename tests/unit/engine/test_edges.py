"""Where one thing ends and the next begins: slots, the longest encoding, the count of holders, the end of an image."""

from __future__ import annotations

import contextlib
import random

import pytest

from nbdzram.engine.arena import allocations_left, fail_allocation
from nbdzram.engine.disk import Disk
from nbdzram.engine.estimate import Estimate
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import HUGE_THRESHOLD, Pool
from nbdzram.errors import PoolFull
from tests.unit.engine.blocks import BLOCK, half_random, run, text

SIZE = 64 << 20
MOST_HOLDERS = 511  # that a cell counts by itself


def encoded_length(pool: Pool, disk: Disk, block: bytes) -> int:
    """How long a block's object is, from the pool's own counter."""
    before = pool.stats().compr_data_size
    disk.write(0, block)
    after = pool.stats().compr_data_size
    disk.trim(0, BLOCK)
    assert pool.stats().compr_data_size == before
    return after - before


def test_neighbours_in_every_size_class_leave_each_other_alone() -> None:
    """Objects of each length, at multiples of 16 and a byte beside: a slot holds its own."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    lengths = set()
    for random_bytes in range(8, 3610):
        blocks = [half_random(random_bytes * 3 + number, random_bytes) for number in range(3)]
        lengths.add(encoded_length(pool, disk, blocks[0]))
        for number in (1, 0, 2):
            disk.write((random_bytes * 3 + number) * BLOCK, blocks[number])
    for random_bytes in range(8, 3610):
        for number in range(3):
            expected = half_random(random_bytes * 3 + number, random_bytes)
            assert disk.read((random_bytes * 3 + number) * BLOCK, BLOCK) == expected, random_bytes
    around = {16 * step + beside for step in range(4, 226) for beside in (-1, 0, 1)}
    assert len(around - lengths) < len(around) // 20  # LZ4 counts literals in bytes of 255: a length in 255 is left out
    pool.check()


def test_a_block_is_stored_raw_from_the_threshold_on_and_not_a_byte_before() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    lengths = [encoded_length(pool, disk, half_random(number, number)) for number in range(3560, 3660)]
    compressed = [length for length in lengths if length != BLOCK]
    assert HUGE_THRESHOLD == 3625
    assert set(range(3600, HUGE_THRESHOLD)) - set(compressed) <= {3610}  # see above
    assert max(compressed) == HUGE_THRESHOLD - 1
    assert lengths == sorted(lengths)
    assert lengths[-1] == BLOCK


@pytest.mark.parametrize("inline", [False, True])
def test_dozens_of_objects_have_more_holders_than_a_cell_counts(inline: bool) -> None:
    """They come, go below the bound and above it again, and go; each is freed with its last holder, and not before."""
    pool = Pool(inline_dedup=inline)
    disk = pool.create("disk", 2 * SIZE)
    objects = 40
    holders = [MOST_HOLDERS - 1 + number % 4 for number in range(objects)]
    places = [number for number, count in enumerate(holders) for _ in range(count)]
    choose = random.Random(1)
    choose.shuffle(places)
    content = b"".join(text(number) for number in places)
    disk.write(0, content)
    run(Fold(pool))
    assert pool.stats().objects == objects
    clone = pool.clone(disk, "clone")
    clone.write(0, content[: len(content) // 2])
    run(Fold(pool))
    run(Compact(pool))
    pool.check()
    pool.delete(clone)
    pool.check()
    order = list(range(len(places)))
    choose.shuffle(order)
    for step, place in enumerate(order):
        disk.trim(place * BLOCK, BLOCK)
        holders[places[place]] -= 1
        if step % 2000 == 0:
            assert pool.stats().objects == sum(count > 0 for count in holders)
            pool.check()
    assert pool.stats().objects == pool.stats().handles == 0
    pool.check()


def test_what_counts_many_holders_is_used_again_and_begins_with_none() -> None:
    """It is made for sixteen handles; while it is free, the first of them names the next that is."""
    pool = Pool(inline_dedup=True)
    disk = pool.create("disk", 16 * SIZE)
    contents = [half_random(number) for number in range(8 * 16)]
    for number, content in enumerate(contents):
        disk.write(number * BLOCK, content)
    popular, more, metadata = contents[15::16], MOST_HOLDERS + 1, set()
    for _ in range(10):
        disk.write(len(contents) * BLOCK, b"".join(content * more for content in popular))
        metadata.add(pool.stats().metadata)
        disk.trim(len(contents) * BLOCK, len(popular) * more * BLOCK)
    assert len(metadata) == 1
    disk.trim(0, len(contents) * BLOCK)
    assert pool.stats().objects == pool.stats().handles == 0
    pool.check()


@pytest.mark.parametrize("tail", [1, 511, 4095])
def test_an_estimate_counts_a_part_of_a_block_at_an_images_end_as_one(tail: int) -> None:
    """As an export of that size stores it: what is missing is zeroes."""
    content = half_random(1) * 2 + text(2)[:tail]
    part, whole = Estimate(), Estimate()
    part.feed(content)
    whole.feed(content.ljust(3 * BLOCK, b"\0"))
    assert part.figures() == whole.figures()
    assert part.figures().blocks == 3
    whole.feed(content)
    assert whole.figures().distinct_objects == part.figures().distinct_objects


def test_a_holder_that_cannot_be_counted_is_refused_and_nothing_is_kept_for_ever() -> None:
    """Without memory for the 512th holder of its objects a shared leaf is not copied; once there is some, it is."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    blocks = 64
    disk.write(0, b"".join(text(number + 1) for number in range(blocks)))
    for number in range(MOST_HOLDERS - 1):
        pool.clone(disk, f"twin {number}").trim(100 * BLOCK, BLOCK)
        pool.disks()[-1].write(100 * BLOCK, text(0))
    content = disk.read(0, 128 * BLOCK)
    refused = 0
    for allocations in range(20):
        twin = pool.clone(disk, "refused")
        fail_allocation(allocations)
        try:
            twin.write(0, text(0))
        except PoolFull:
            refused += 1
            assert twin.read(0, 128 * BLOCK) == content
        fail_allocation(-1)
        pool.check()
        twin.write(0, text(0))
        assert twin.read(0, 128 * BLOCK) == text(0) + content[BLOCK:]
        pool.delete(twin)
    assert refused
    for twin in pool.disks():
        pool.delete(twin)
    assert pool.stats().objects == 0
    pool.check()


def test_who_comes_and_goes_beyond_what_a_cell_counts_takes_no_memory() -> None:
    pool = Pool(inline_dedup=True)
    disk = pool.create("disk", SIZE)
    disk.write(0, text(1))
    disk.write(BLOCK, text(1) * MOST_HOLDERS)
    assert pool.stats().objects == 1
    before = pool.stats().memory_used
    for _ in range(200):
        disk.trim(MOST_HOLDERS * BLOCK, BLOCK)
        disk.write(MOST_HOLDERS * BLOCK, text(1))
    assert pool.stats().memory_used == before


def test_a_fold_leaves_for_the_next_one_what_it_cannot_count() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for allocations in range(3):
        disk.write(0, text(allocations) * (MOST_HOLDERS + 10))
        for _ in range(2):
            fail_allocation(allocations)
            run(Fold(pool))
            fail_allocation(-1)
            pool.check()
        assert pool.stats().objects == 1
    disk.trim(0, SIZE)
    assert pool.stats().objects == 0


@pytest.mark.parametrize("limit", [0, 200 * BLOCK], ids=["beside others", "alone"])
def test_a_write_that_fails_at_any_allocation_leaves_no_handle_that_is_counted(limit: int) -> None:
    """Whether it is refused, or finds room when it is tried again."""
    failures, left = 0, -1
    while left < 0:
        with Pool(mem_limit=limit) as pool:
            disk = pool.create("disk", 1 << 40)
            disk.write(0, text(1))
            fail_allocation(failures)
            for number in (1, 2):
                with contextlib.suppress(PoolFull):
                    disk.write((number << 18) * BLOCK, half_random(number))
            left = allocations_left()
            fail_allocation(-1)
            assert pool.stats().handles == pool.stats().orig_data_size // BLOCK
            pool.check()
        failures += 1
    assert failures > 4


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_branch_is_whole_wherever_below_it_the_first_block_lies(level: int) -> None:
    """What is not stored yet below it is a hole of its own place."""
    below = 512**level  # blocks of a child of that branch
    with Pool() as pool:
        disk = pool.create("disk", 512 * below * BLOCK)
        written = {}
        for child in (5, 0, 511, 4):
            place = child * below + 3
            disk.write(place * BLOCK, text(child))
            written[place] = text(child)
            assert all(disk.read(at * BLOCK, BLOCK) == content for at, content in written.items())
            assert disk.read((place + 1) * BLOCK, BLOCK) == bytes(BLOCK)
        pool.check()
