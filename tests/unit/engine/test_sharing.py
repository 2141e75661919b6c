"""What a client is told of sharing is what is within its own export, whatever others store."""

from __future__ import annotations

from threading import Thread

import pytest

from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from tests.support.threads import wait_until
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

SIZE = 1 << 30
STRETCH = 256 << 20


def shared(disk: Disk, offset: int = 0, length: int = SIZE) -> list[int]:
    """The blocks that are told to be shared."""
    told: list[int] = []
    at = offset
    for size, bits in disk.extents(offset, length, 1 << 20, Extent.SHARED):
        told += range(at // BLOCK, (at + size) // BLOCK) if bits else []
        at += size
    return told


def write_own(disk: Disk) -> None:
    disk.write(0, text(1) + noise(2) + half_random(3) + text(1) + noise(4) + noise(4))


OWN = [0, 3, 4, 5]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("other", [None, [1], [2, 3], [1, 2, 3, 4]])
def test_what_is_told_of_sharing_does_not_depend_on_others(inline: bool, other: list[int] | None) -> None:
    pool = Pool(inline_dedup=inline)
    blocks = {1: text(1), 2: noise(2), 3: half_random(3), 4: noise(4)}
    if other:
        pool.create("other", SIZE).write(0, b"".join(blocks[number] for number in other))
    disk = pool.create("disk", SIZE)
    write_own(disk)
    if other:
        pool.create("later", SIZE).write(0, b"".join(blocks[number] for number in other))
    run(Fold(pool))
    assert shared(disk) == OWN
    assert shared(disk, BLOCK, 2 * BLOCK) == []
    assert shared(disk, 3 * BLOCK, BLOCK) == [3]


def test_a_clone_does_not_show_in_what_is_told() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    write_own(disk)
    run(Fold(pool))
    twin = pool.clone(disk, "twin")
    assert shared(disk) == shared(twin) == OWN
    twin.write(0, noise(9))
    assert shared(disk) == OWN
    assert shared(twin) == [4, 5]


def test_a_clone_that_never_wrote_tells_its_own_sharing_and_costs_nothing_of_its_own() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    write_own(disk)
    run(Fold(pool))
    twin = pool.clone(disk, "twin")
    usage = twin.usage()
    assert (usage.unique, usage.stored) == (0, 6 * BLOCK)
    assert usage.shared == usage.compressed == disk.usage().compressed
    pool.delete(disk)
    assert twin.usage().unique == pool.stats().compr_data_size


@pytest.mark.parametrize("other", [False, True])
def test_a_twin_that_goes_or_comes_while_one_looks_shows_nothing_of_others(other: bool) -> None:
    """Else who asks, and writes beside it, would see whether the object has holders elsewhere."""
    pool = Pool(inline_dedup=True)
    if other:
        pool.create("other", SIZE).write(0, text(1) + text(2))
    disk = pool.create("disk", SIZE)
    for block, content in enumerate((text(1), text(1), text(2))):
        disk.write(block * BLOCK, content)
    assert shared(disk) == [0, 1]
    pool.test_locks(linger="who looked for twins")

    def change() -> None:
        wait_until(lambda: pool.lingering() > 0)
        disk.trim(BLOCK, BLOCK)  # nobody but another export holds what block 0 holds
        disk.write(3 * BLOCK, text(2))
        pool.test_locks()

    changing = Thread(target=change)
    changing.start()
    told = shared(disk)  # of block 2 it is not known yet that it has a twin: its own is where that is seen
    changing.join()
    assert told == [3]
    assert shared(disk) == [2, 3]


@pytest.mark.parametrize("other", [False, True])
def test_a_fold_while_one_looks_shows_nothing_of_others(other: bool) -> None:
    """Of equal objects it keeps another's where that came first, which nobody who looked through this export knows."""
    pool = Pool()
    if other:
        pool.create("other", SIZE).write(0, text(1))
    disk = pool.create("disk", SIZE)
    disk.write(0, text(1) + noise(2) + text(1))
    pool.test_locks(linger="who looked for twins")

    def fold() -> None:
        wait_until(lambda: pool.lingering() > 0)
        run(Fold(pool))
        pool.test_locks()

    folding = Thread(target=fold)
    folding.start()
    told = shared(disk)
    folding.join()
    assert told == [0, 2]


def test_blocks_that_wait_for_a_fold_hide_no_twin() -> None:
    """They are equal, and objects of their own: those that one finds first and last of the content are no twins yet."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(BLOCK, text(1) + text(1))
    run(Fold(pool))
    disk.write(0, text(1))
    disk.write(3 * BLOCK, text(1))
    assert shared(disk) == [1, 2]


def test_sharing_is_told_within_a_stretch_and_over_holes() -> None:
    pool = Pool()
    disk = pool.create("disk", 1 << 50)
    for offset in (0, STRETCH - BLOCK, STRETCH, 2 * STRETCH - BLOCK, 1 << 49):
        disk.write(offset, text(1))
    run(Fold(pool))
    assert shared(disk, 0, 1 << 50) == [
        number // BLOCK for number in (0, STRETCH - BLOCK, STRETCH, 2 * STRETCH - BLOCK)
    ]


def told_of_everybody() -> tuple[Pool, Disk]:
    """Another export holds what one block of this one does, and the pool tells sharing."""
    pool = Pool(tell_sharing=True)
    pool.create("other", SIZE).write(0, noise(2))
    disk = pool.create("disk", SIZE)
    write_own(disk)
    run(Fold(pool))
    return pool, disk


def test_a_pool_that_tells_sharing_tells_it_of_everybody() -> None:
    _, disk = told_of_everybody()
    assert shared(disk) == [0, 1, 3, 4, 5]


def test_a_pool_that_ceases_to_tell_sharing_while_somebody_asks_tells_nothing_of_it() -> None:
    """Who had no need to look for twins has none to go by."""
    pool, disk = told_of_everybody()
    pool.test_locks(linger="who looked for twins")

    def change() -> None:
        wait_until(lambda: pool.lingering() > 0)
        pool.tells_sharing = False
        pool.test_locks()

    changing = Thread(target=change)
    changing.start()
    told = shared(disk)
    changing.join()
    assert told == []
    assert shared(disk) == OWN


def test_more_objects_than_a_set_begins_with_are_told_apart() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(
        0, b"".join(text(number) for number in range(2000)) + b"".join(text(number) for number in range(0, 2000, 3))
    )
    pool.create("other", SIZE).write(0, b"".join(text(number) for number in range(2000)))
    run(Fold(pool))
    assert shared(disk) == [*range(0, 2000, 3), *range(2000, 2667)]


@pytest.mark.parametrize("mask", [Extent.SHARED, Extent.HOLE])
def test_who_asks_what_blocks_are_shuts_out_nobody(mask: Extent) -> None:
    """Again and again, and at once: whoever writes meanwhile would have to wake up in between."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(text(number) for number in range(1000)))
    pool.test_locks(watch=True)
    disk.extents(0, SIZE, 1 << 20, mask)
    assert pool.longest_holds()["pool"] == (0, "")
    disk.usage()
    assert pool.longest_holds()["pool"] > (0, "")


@pytest.mark.parametrize("new", [noise(2), text(2), b"\x07" * BLOCK])
def test_a_block_that_is_overwritten_is_told_as_it_is_then(new: bytes) -> None:
    """Who looks has its entry in hand; what that led to is gone when it looks there."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, new)
    expected = disk.extents(0, BLOCK, 1)
    disk.write(0, text(1))
    pool.test_locks(linger="who looks behind an entry")

    def overwrite() -> None:
        wait_until(lambda: pool.lingering() > 0)
        disk.write(0, new)  # beside who looks, who is not waited for
        pool.test_locks()

    writing = Thread(target=overwrite)
    writing.start()
    told = disk.extents(0, BLOCK, 1)
    writing.join()
    assert told == expected
    pool.check()


def test_inline_only_equal_content_is_one_object_whatever_fingerprints_say() -> None:
    with Pool(inline_dedup=True, fingerprint_mask=0) as pool:
        disk = pool.create("disk", 1 << 20)
        contents = [noise(1), text(2), noise(3), text(2)]
        for block, content in enumerate(contents):
            disk.write(block * BLOCK, content)
        disk.write(4 * BLOCK, b"".join(contents))
        assert disk.read(0, 8 * BLOCK) == 2 * b"".join(contents)
        pool.check()
