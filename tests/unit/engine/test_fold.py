"""Folding: equal objects become one, unequal ones never, and nobody's content changes."""

from __future__ import annotations

import pytest

from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import FoldReport
from nbdzram.engine.run import HOLD_COUNT
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

SIZE = 16 << 20


def filled(pool: Pool, name: str, blocks: list[bytes]) -> Disk:
    disk = pool.create(name, SIZE)
    disk.write(0, b"".join(blocks))
    return disk


def distinct(*disks: Disk) -> int:
    """Distinct blocks that need an object, counted from what the disks read."""
    blocks = {disk.read(offset, BLOCK) for disk in disks for offset in range(0, disk.size_bytes, BLOCK)}
    return sum(1 for block in blocks if block != block[:8] * 512)


def test_equal_blocks_of_one_disk_and_of_two_become_one_object() -> None:
    pool = Pool()
    contents = [half_random(number % 10) for number in range(50)] + [noise(number % 3) for number in range(9)]
    one, two = filled(pool, "one", contents), filled(pool, "two", contents[::-1])
    before = pool.stats()
    report = run(Fold(pool))
    after = pool.stats()
    assert after.objects == distinct(one, two) == 13
    assert report.objects_merged == 118 - 13
    assert report.bytes_freed == before.compr_data_size - after.compr_data_size
    assert after.handles == before.handles
    assert after.orig_data_size == before.orig_data_size
    assert one.read(0, 59 * BLOCK) == b"".join(contents)
    assert two.read(0, 59 * BLOCK) == b"".join(contents[::-1])
    pool.check()


def test_blocks_that_differ_in_their_last_byte_stay_two_also_under_one_fingerprint() -> None:
    """Two encodings, so that the fold has to decode both and compare the blocks."""
    pool = Pool(fingerprint_mask=0)
    contents = [text(1)[:-1] + last for last in (b"x", b"y")]
    disk = filled(pool, "disk", contents)
    assert run(Fold(pool)).objects_merged == 0
    assert disk.read(0, 2 * BLOCK) == b"".join(contents)


@pytest.mark.parametrize("recompressed_first", [True, False])
def test_of_two_encodings_of_a_block_the_shorter_stays(recompressed_first: bool) -> None:
    """Whichever of them was known first: the linked object gives way to a shorter suspect."""
    pool = Pool()
    pool.set_clock(1000)
    disk = filled(pool, "disk", [text(7)])
    if recompressed_first:
        run(Recompress(pool, level=19))
        disk.write(BLOCK, text(7))
    else:
        twin = pool.create("twin", SIZE)
        twin.write(0, text(7))
        pool.set_clock(2000)
        disk.read(0, BLOCK)  # so that only the twin, which is a suspect, is idle
        run(Recompress(pool, level=19, idle_seconds=500))
    lengths = pool.stats().compr_by_codec
    assert lengths["lz4"] > lengths["zstd"] > 0
    assert run(Fold(pool)).objects_merged >= 1
    assert pool.stats().compr_by_codec["lz4"] == 0
    assert disk.read(0, BLOCK) == text(7)
    pool.check()


def test_the_very_first_handle_can_be_a_suspect() -> None:
    pool = Pool()
    disk = filled(pool, "disk", [text(1), text(2)])
    disk.trim(0, BLOCK)
    pool.stats()  # who asks has what was freed taken back
    disk.write(0, text(2))  # gets the handle that was freed last
    assert run(Fold(pool)).objects_merged == 1


def test_a_second_fold_looks_at_nothing() -> None:
    pool = Pool()
    filled(pool, "disk", [text(number % 7) for number in range(700)])
    run(Fold(pool))
    again = Fold(pool)
    assert again.total == 0
    assert run(again) == FoldReport(objects_merged=0, bytes_freed=0, pages_returned=0, comparisons=0)


def test_fold_returns_pages_and_counts_them() -> None:
    pool = Pool()
    filled(pool, "disk", [half_random(number % 8) for number in range(800)])
    before = pool.stats()
    report = run(Fold(pool))
    after = pool.stats()
    assert after.pages_folded == report.pages_returned
    assert before.mem_used_total - after.mem_used_total == after.pages_folded * BLOCK > 0


def test_dry_run_predicts_and_changes_nothing() -> None:
    pool = Pool()
    disk = filled(pool, "disk", [half_random(number % 10) for number in range(100)])
    disk.write(0, noise(1))  # the first holder of one content goes before anybody looked at the others
    before = pool.stats()
    predicted = run(Fold(pool, dry_run=True))
    assert pool.stats().compr_data_size == before.compr_data_size
    done = run(Fold(pool))
    assert (predicted.objects_merged, predicted.bytes_freed) == (done.objects_merged, done.bytes_freed)
    assert before.compr_data_size - pool.stats().compr_data_size == done.bytes_freed


def test_only_what_changed_since_the_last_fold_is_looked_at() -> None:
    pool = Pool()
    disk = filled(pool, "disk", [half_random(number % 100) for number in range(1000)])
    run(Fold(pool))
    disk.write(0, half_random(5))
    disk.write(BLOCK, half_random(6))
    disk.write(2 * BLOCK, half_random(5000))
    later = Fold(pool)
    assert run(later).objects_merged == 2
    assert later.done == 2


# What is known to go wrong in the kernel series that this follows.


def test_siblings_survive_the_first_handle_of_their_object() -> None:
    """Fold, free the canonical object's first handle, compact, fold, read the siblings."""
    pool = Pool()
    disk = filled(pool, "disk", [half_random(number % 4) for number in range(64)])
    run(Fold(pool))
    disk.trim(0, 4 * BLOCK)  # the four objects' first handles
    disk.write(10 * BLOCK, noise(1))
    run(Compact(pool))
    pool.check()
    run(Fold(pool))
    for number in set(range(4, 64)) - {10}:
        assert disk.read(number * BLOCK, BLOCK) == half_random(number % 4)
    pool.check()


def test_everything_reads_back_after_fold_and_compaction() -> None:
    pool = Pool()
    contents = [half_random(number % 50, 100 + 30 * (number % 50)) for number in range(1000)]
    disk = filled(pool, "disk", contents)
    run(Fold(pool))
    run(Compact(pool))
    assert disk.read(0, 1000 * BLOCK) == b"".join(contents)
    pool.check()


def test_a_handle_number_used_again_after_a_fold_leads_to_its_new_object() -> None:
    pool = Pool()
    disk = filled(pool, "disk", [half_random(number % 2) for number in range(20)])
    run(Fold(pool))
    disk.trim(0, 10 * BLOCK)
    for number in range(10):
        disk.write(number * BLOCK, noise(number))
    run(Fold(pool))
    assert disk.read(0, 10 * BLOCK) == b"".join(noise(number) for number in range(10))
    assert disk.read(10 * BLOCK, 10 * BLOCK) == b"".join(half_random(number % 2) for number in range(10))
    pool.check()


@pytest.mark.parametrize("random_bytes", range(500, 520))
def test_equal_content_folds_whatever_lies_in_its_slot_and_beside_it(random_bytes: int) -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    # Fill slots with noise of the same class first, so that slack and neighbours differ between the twins.
    for number in range(40):
        disk.write(number * BLOCK, half_random(number + 1000, random_bytes))
    for number in (3, 30):
        disk.write(number * BLOCK, half_random(7, random_bytes))
        disk.write((number + 1) * BLOCK, noise(number))
    run(Fold(pool))
    assert pool.stats().objects == distinct(disk)
    pool.check()


def test_contents_that_share_a_prefix_stay_apart() -> None:
    pool = Pool(fingerprint_mask=0)
    # Incompressible heads of growing length: each encoding begins like the next one.
    contents = [noise(1)[:length] + bytes(BLOCK - length) for length in range(1000, 1064)]
    disk = filled(pool, "disk", contents)
    assert run(Fold(pool)).objects_merged == 0
    assert disk.read(0, 64 * BLOCK) == b"".join(contents)
    pool.check()


@pytest.mark.parametrize("mask", [0, 1, 0xF])
def test_a_constant_fingerprint_is_slower_and_just_as_right(mask: int) -> None:
    pool = Pool(fingerprint_mask=mask)
    contents = [half_random(number % 30) for number in range(90)] + [noise(number % 5) for number in range(10)]
    disk = filled(pool, "disk", contents)
    run(Fold(pool))
    assert pool.stats().objects == 35
    assert run(Fold(pool)).objects_merged == 0
    for number in range(0, 100, 3):
        disk.write(number * BLOCK, text(number))
        contents[number] = text(number)
    run(Fold(pool))
    run(Compact(pool))
    assert disk.read(0, 100 * BLOCK) == b"".join(contents)
    assert pool.stats().objects == distinct(disk)
    pool.check()


def test_fold_between_any_two_writes_changes_nothing_that_is_read() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for number in range(200):
        disk.write(number % 37 * BLOCK, half_random(number % 5))
        fold = Fold(pool)
        fold.step(1)
        assert disk.read(number % 37 * BLOCK, BLOCK) == half_random(number % 5)
    run(Fold(pool))
    assert pool.stats().objects == 5
    pool.check()


# Compaction.


def test_compaction_ends_within_one_partial_page_a_class() -> None:
    pool = Pool()
    disk = pool.create("disk", 64 << 20)
    for number in range(8192):
        disk.write(number * BLOCK, half_random(number, 200 + number % 16 * 200))
    for number in range(8192):
        if number % 5:
            disk.trim(number * BLOCK, BLOCK)
    before = pool.stats()
    predicted = run(Compact(pool, dry_run=True)).pages_returned
    report = run(Compact(pool))
    after = pool.stats()
    assert report.pages_returned == predicted == after.pages_compacted
    assert before.mem_used_total - after.mem_used_total == predicted * BLOCK
    # Rounding to 16 bytes, the tail of a zspage, and a page a class: three percent and 16 classes' pages.
    assert after.mem_used_total <= after.compr_data_size * 1.03 + 32 * BLOCK
    for number in range(0, 8192, 5):
        assert disk.read(number * BLOCK, BLOCK) == half_random(number, 200 + number % 16 * 200)
    assert run(Compact(pool)).objects_moved == 0
    pool.check()


def steps_of_one(compaction: Compact) -> int:
    steps = 1
    while compaction.step(1):
        steps += 1
    return steps


def test_a_compaction_chooses_one_zspage_and_looks_at_one_handle_a_unit_of_its_budget() -> None:
    """So no step, and no hold of the pool's lock within it, is longer for a larger pool."""
    nothing_to_do = steps_of_one(Compact(Pool()))
    pool = Pool()
    disk = pool.create("disk", 128 << 20)
    for number in range(8000):
        disk.write(number * BLOCK, half_random(number))
    for number in range(8000):
        if number % 4:
            disk.trim(number * BLOCK, BLOCK)
    before = pool.stats().zspages
    compaction = Compact(pool)
    steps = steps_of_one(compaction)
    emptied = before - pool.stats().zspages
    assert emptied > HOLD_COUNT
    assert steps >= nothing_to_do + emptied + compaction.total
    pool.check()


def test_writes_between_the_steps_of_a_compaction_are_kept() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    contents = {number: half_random(number) for number in range(2000)}
    for number, block in contents.items():
        disk.write(number * BLOCK, block)
    for number in range(0, 2000, 2):
        disk.trim(number * BLOCK, BLOCK)
        contents[number] = bytes(BLOCK)
    compaction = Compact(pool)
    number = 0
    while compaction.step(50):
        contents[number] = half_random(number + 9000)
        disk.write(number * BLOCK, contents[number])
        number += 7
        pool.check()
    assert all(disk.read(number * BLOCK, BLOCK) == block for number, block in contents.items())
    pool.check()


def test_a_compaction_given_up_half_way_leaves_a_usable_pool() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for number in range(2000):
        disk.write(number * BLOCK, half_random(number))
    for number in range(0, 2000, 2):
        disk.trim(number * BLOCK, BLOCK)
    compaction = Compact(pool)
    compaction.step(100)
    del compaction
    pool.check()
    run(Compact(pool))
    pool.check()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_compaction_whose_pass_another_ended_is_done_and_does_not_touch_the_next(*, given_up: bool) -> None:
    """There is one at a time in a pool, and whoever has a reason carries it on."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for number in range(2000):
        disk.write(number * BLOCK, half_random(number))
    for number in range(0, 2000, 2):
        disk.trim(number * BLOCK, BLOCK)
    first, second = Compact(pool), Compact(pool)
    assert first.step(1)
    assert second.step(1 << 20)  # the first one's pass, to its end
    moved = pool.stats().objects_moved
    assert moved
    assert second.step(1)  # its own begins
    if given_up:
        del first
    else:
        assert not first.step(1)
        assert (first.done, first.report().objects_moved) == (first.total, moved)
    assert second.step(1)
    assert run(second).objects_moved == pool.stats().objects_moved - moved
    pool.check()


@pytest.mark.parametrize("given_up", [False, True])
def test_slots_that_a_compaction_did_not_get_to_empty_are_used_again(given_up: bool) -> None:
    """In every size class: what was marked to be emptied takes blocks again once the compaction ends, or is dropped."""
    sizes = (300, 900, 1500, 2100)
    pool = Pool()
    disk = pool.create("disk", SIZE)

    def write(numbers: range, seed: int) -> None:
        for number in numbers:
            disk.write(number * BLOCK, half_random(number + seed, sizes[number // 2 % len(sizes)]))

    write(range(1600), 0)
    for number in range(0, 1600, 2):
        disk.trim(number * BLOCK, BLOCK)
    compaction = Compact(pool)
    before = pool.stats().zspages
    while compaction.done == 0 and compaction.step(1):
        pass  # every class has chosen what it empties
    write(range(0, 1600, 2), 5000)  # into the slots where it was to go
    if given_up:
        del compaction
    else:
        assert run(compaction).objects_moved < 800
    for number in range(0, 1600, 2):
        disk.trim(number * BLOCK, BLOCK)
    write(range(0, 1600, 2), 9000)
    assert pool.stats().zspages <= before + 2 * len(sizes)
    pool.check()
