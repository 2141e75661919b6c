"""Nobody holds a pool's lock for long, whatever a client has written.

Counted in turns of the lock: what looks at so many things must have let it go so often. How long a hold takes in
processor time is measured by `make bench`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdzram
from nbdzram.engine import moment
from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.run import HOLD_COUNT
from nbdzram.engine.scrub import Scrub
from nbdzram.engine.walk import Told, Walk, blocks_apart, leaves_apart
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

LEAF_BLOCKS = 512
CHILDREN = 1024
LOOKS = 4096  # places of branches passed over under one hold (engine/lock.pxd)
LEAF = LEAF_BLOCKS * BLOCK
BRANCH = CHILDREN * LEAF  # 2 GiB
SIZE = 1 << 42

CHANGES_OF_A_SHARED_LEAF: dict[str, Callable[[Disk], object]] = {
    "write": lambda disk: disk.write(7 * BLOCK, text(1)),
    "a part of a block": lambda disk: disk.write(7 * BLOCK + 1, b"part"),
    "zero": lambda disk: disk.zero(7 * BLOCK, BLOCK, no_hole=True),
    "trim": lambda disk: disk.trim(7 * BLOCK, BLOCK),
    "trim most of it": lambda disk: disk.trim(BLOCK, LEAF - BLOCK),
    "trim all of it": lambda disk: disk.trim(0, LEAF),
}
EXPORTS = 300

WALKS: dict[str, Callable[[Pool, Disk], object]] = {
    "trim": lambda _, disk: disk.trim(0, disk.size_bytes),
    "extents": lambda _, disk: disk.extents(0, disk.size_bytes, 1 << 20),
    "usage": lambda _, disk: disk.usage(),
    "delete": lambda pool, disk: pool.delete(disk),
    "shrink": lambda _, disk: disk.resize(0),
}


def turns_of(pool: Pool, act: Callable[[], object]) -> int:
    before = pool.turns() + pool.turns_behind()
    act()
    return pool.turns() + pool.turns_behind() - before


def test_who_waits_sleeps_and_never_yields() -> None:
    """Since Linux 6.18 who yields gives up its share, some 4 ms each time, and clients wait as long (wait.pxd)."""
    package = Path(nbdzram.__file__).parent
    sources = [path for path in package.rglob("*") if path.suffix in {".py", ".pyx", ".pxd"}]
    assert len(sources) > 100
    yielding = [path.name for path in sources if re.search(r"\b(sched|thrd|pthread)_yield\(", path.read_text())]
    assert yielding == []


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


@pytest.mark.parametrize("change", CHANGES_OF_A_SHARED_LEAF)
def test_a_leaf_that_a_clone_shares_is_copied_or_dropped_a_few_blocks_at_a_time(change: str) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for block in range(LEAF_BLOCKS):
        disk.write(block * BLOCK, half_random(block, 100))
    twin = pool.clone(disk, "twin")
    before = disk.read(0, LEAF)
    pool.test_locks(watch=True)
    assert turns_of(pool, lambda: CHANGES_OF_A_SHARED_LEAF[change](disk)) >= LEAF_BLOCKS // HOLD_COUNT
    assert pool.most_in_a_hold()[0] <= HOLD_COUNT
    assert disk.read(0, LEAF) != before
    assert twin.read(0, LEAF) == before
    pool.check()


def test_a_leaf_is_copied_once_for_all_that_is_written_to_it() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, text(1) * LEAF_BLOCKS)
    pool.clone(disk, "twin")
    disk.write(0, text(2))
    assert turns_of(pool, lambda: disk.write(BLOCK, text(3))) < LEAF_BLOCKS // HOLD_COUNT


def test_the_blocks_of_all_exports_are_summed_a_few_exports_at_a_time() -> None:
    def turns_beside(exports: int) -> int:
        pool = Pool()
        for number in range(exports):
            pool.create(f"disk {number}", SIZE).write(0, text(number))
        return turns_of(pool, pool.check) - exports  # each export's count begins with a turn of its own

    assert turns_beside(EXPORTS) - turns_beside(1) >= EXPORTS // HOLD_COUNT


def test_ages_are_looked_after_a_few_leaves_at_a_time() -> None:
    pool = Pool()
    assert turns_of(pool, lambda: pool.set_clock(60)) >= 64 * LEAF_BLOCKS // LOOKS


def test_what_counts_many_holders_grows_by_a_page_and_never_all_at_once() -> None:
    """A clone that is written adds a holder to each object of its leaf: all pass what a cell counts at once."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    leaves, more_than_a_cell_counts = 5, 520
    for block in range(leaves * LEAF_BLOCKS):
        disk.write(block * BLOCK, text(block + 1))
    grown = []
    for number in range(more_than_a_cell_counts):
        twin = pool.clone(disk, f"twin {number}")
        twin.trim(0, BLOCK)  # copies the branches, which are pages too
        for leaf in range(1, leaves):
            before = pool.stats().memory_used
            twin.trim(leaf * LEAF, BLOCK)
            grown.append(pool.stats().memory_used - before)
    leaf, counts, their_places = BLOCK, BLOCK, BLOCK
    assert max(grown) <= leaf + counts + their_places
    pool.check()


def test_what_a_stream_tells_is_copied_a_few_blocks_at_a_time() -> None:
    """Blocks that do not compress: 64 of them, and as many of the copy before, are half a megabyte."""
    pool = Pool()
    blocks, copied_a_hold = 256, 64 << 10
    disk = pool.create("disk", blocks * BLOCK)
    disk.write(0, b"".join(noise(number) for number in range(blocks)))
    (copy,) = moment.snapshot_together([disk], ["copy"])
    moment.finish(copy)
    walk = Walk(copy, None, Told())

    def tell() -> None:
        while walk.step() is not None:
            pass

    assert turns_of(pool, tell) >= blocks * BLOCK // copied_a_hold
    assert walk.progress == 1.0
    beyond = Walk(copy, None, Told(), 2 * blocks)
    assert (beyond.step(), beyond.position, beyond.progress) == (None, blocks, 1.0)


def stream(disk: Disk) -> None:
    """All of it, and what came behind a copy."""
    (before,) = moment.snapshot_together([disk], ["before"])
    disk.write(0, text(0))
    (copy,) = moment.snapshot_together([disk], ["copy"])
    for origin in (None, before):
        leaves_apart(copy, origin, 1 << 30)
        blocks_apart(copy, origin, 1 << 30)
        told = Walk(copy, origin, Told())
        while told.step() is not None:
            pass
    moment.discard([before, copy])


def unreadable(disk: Disk) -> None:
    assert disk.first_unreadable(0) is None  # for a check that found something


LOOKS_AT_LEAVES: dict[str, Callable[[Pool, Disk], object]] = {
    **{name: walk for name, walk in WALKS.items() if name != "delete"},
    "what its client may know of sharing": lambda _, disk: disk.extents(0, disk.size_bytes, 1 << 20, Extent.SHARED),
    "check": lambda pool, _: run(Check(pool)),
    "unreadable": lambda _, disk: unreadable(disk),
    "scrub": lambda pool, _: run(Scrub(pool)),
    "recompress": lambda pool, _: run(Recompress(pool)),
    "stream": lambda _, disk: stream(disk),
}


@pytest.mark.parametrize("look", LOOKS_AT_LEAVES)
def test_a_hold_looks_at_a_few_entries_and_passes_over_a_few_empty_places_whatever_it_is_for(look: str) -> None:
    """A leaf of objects, one of repeated words, which leads to nothing, and one block in each 2 GiB."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for block in range(LEAF_BLOCKS):
        disk.write(block * BLOCK, half_random(block % 50, 100))
    disk.write(LEAF, b"\x07" * LEAF)
    for number in range(1, 40):
        disk.write(number * BRANCH - BLOCK, text(number))
    pool.test_locks(watch=True)
    LOOKS_AT_LEAVES[look](pool, disk)
    entries, words = pool.most_in_a_hold()
    assert 1 < entries <= HOLD_COUNT
    assert 1 < words <= LOOKS
    pool.check()


def test_holds_are_measured_from_when_they_are_watched() -> None:
    """A measurement takes small steps, each by itself."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    pool.test_locks(watch=True)
    disk.write(0, text(1))
    disk.trim(0, BLOCK)
    disk.usage()
    assert all(longest_ns > 0 for longest_ns, _ in pool.longest_holds().values())
    pool.test_locks(watch=True)
    assert all(longest_ns == 0 for longest_ns, _ in pool.longest_holds().values())


def test_who_deletes_a_large_disk_stands_behind_clients() -> None:
    """Each hold that is taken behind them is none of the turns that others had."""

    def turns_of_deleting(blocks: int) -> int:
        with Pool() as pool:
            disk = pool.create("disk", blocks * BLOCK)
            disk.write(0, b"".join(half_random(number, 100) for number in range(blocks)))
            before = pool.turns()
            pool.delete(disk)
            return pool.turns() - before

    assert turns_of_deleting(4000) <= turns_of_deleting(10) + 2
