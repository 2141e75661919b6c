"""Nobody holds a pool's lock for long, whatever a client has written.

Counted in turns of the lock: what looks at so many things must have let it go so often. How long a hold takes in
processor time is measured by `make bench`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.pool import Pool
from nbdzram.engine.run import HOLD_COUNT
from tests.unit.engine.blocks import BLOCK, half_random, text

LEAF_BLOCKS = 512
CHILDREN = 1024
LOOKS = 4096  # places of branches passed over under one hold (engine/lock.pxd)
LEAF = LEAF_BLOCKS * BLOCK
BRANCH = CHILDREN * LEAF  # 2 GiB
SIZE = 1 << 42

WALKS: dict[str, Callable[[Pool, Disk], object]] = {
    "trim": lambda _, disk: disk.trim(0, disk.size_bytes),
    "extents": lambda _, disk: disk.extents(0, disk.size_bytes, 1 << 20),
    "usage": lambda _, disk: disk.usage(),
    "delete": lambda pool, disk: pool.delete(disk),
    "shrink": lambda _, disk: disk.resize(0),
}


def turns_of(pool: Pool, act: Callable[[], object]) -> int:
    before = pool.turns()
    act()
    return pool.turns() - before


@pytest.mark.parametrize("walk", WALKS)
def test_blocks_are_walked_a_few_at_a_time(walk: str) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    leaves = 3
    for block in range(leaves * LEAF_BLOCKS):
        disk.write(block * BLOCK, half_random(block % 50, 100))
    assert turns_of(pool, lambda: WALKS[walk](pool, disk)) >= leaves * LEAF_BLOCKS // HOLD_COUNT
    pool.check()


@pytest.mark.parametrize("walk", WALKS)
def test_empty_places_of_branches_are_passed_over_a_few_at_a_time(walk: str) -> None:
    """A block at the end of each 2 GiB: between two of them lie a thousand empty places."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    branches = 40
    for number in range(1, branches + 1):
        disk.write(number * BRANCH - BLOCK, text(number))
    assert turns_of(pool, lambda: WALKS[walk](pool, disk)) >= branches * CHILDREN // LOOKS
    pool.check()


@pytest.mark.parametrize("branch", range(1, 12))
def test_a_walk_finds_a_leaf_at_which_a_hold_ends(branch: int) -> None:
    """Between two leaves lie the rests of three branches on the way up and of two on the way down: LOOKS, and a few."""
    top = CHILDREN * BRANCH
    pool = Pool()
    disk = pool.create("disk", 16 * top)
    disk.write(0, text(1))
    disk.write((branch + 1) * top - LEAF, text(2))
    assert disk.usage().stored == 2 * BLOCK
    disk.trim(BLOCK, 16 * top - BLOCK)
    assert disk.usage().stored == BLOCK


@pytest.mark.parametrize("count", [1, 2, 5, 39, 40])
def test_a_walk_that_let_the_lock_go_passes_over_nothing(count: int) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    places = [number * BRANCH * 41 % SIZE // BLOCK * BLOCK + number % 3 * LEAF for number in range(count)]
    places += [LOOKS * LEAF, (LOOKS - 1) * LEAF, (LOOKS + 1) * LEAF, SIZE - BLOCK]
    for number, place in enumerate(places):
        disk.write(place, half_random(number))
    found: list[int] = []
    at = 0
    for length, bits in disk.extents(0, SIZE, 1 << 20):
        if not bits & Extent.HOLE:
            found += range(at, at + length, BLOCK)
        at += length
    assert at == SIZE
    assert found == sorted(set(places))
    assert disk.usage().stored == len(found) * BLOCK
    disk.trim(0, SIZE)
    assert disk.extents(0, SIZE, 10) == [(SIZE, Extent.HOLE | Extent.ZERO)]
    pool.check()
