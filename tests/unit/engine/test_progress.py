"""The share of a run that is done is the share of its time, whatever it walks past; and what comes is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.run import HOLD_COUNT, Run
from tests.unit.engine.blocks import AT_HAND, BLOCK, R, half_random

OBJECTS = 2000
CLONES = 3
STEP = 64
LEAF_BLOCKS = 512


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Distinct blocks in one disk, and clones of it, which add entries and no object."""
    with Pool() as pool:
        disk = pool.create("disk", OBJECTS * BLOCK)
        for number in range(OBJECTS):
            disk.write(number * BLOCK, half_random(number))
        for number in range(CLONES):
            pool.clone(disk, f"clone{number}")
        yield pool


def shares(run: Run[R]) -> list[tuple[R, float]]:
    """After each step: what came of it so far, and the share that is told."""
    told, more = [], True
    while more:
        more = run.step(STEP)
        told.append((run.report(), run.done / max(run.total, 1)))
    return told


def test_a_check_knows_from_the_start_how_much_it_will_do(pool: Pool) -> None:
    """Its walk over tables goes through every entry, not once a page."""
    run = Check(pool)
    told = run.total
    shares(run)
    assert run.done == pytest.approx(told, rel=0.05)
    assert run.done == run.total


def test_a_check_of_blocks_without_an_object_knows_its_walk_too() -> None:
    with Pool() as pool:
        disk = pool.create("even", 8 * OBJECTS * BLOCK)
        disk.write(0, b"same" * (8 * OBJECTS * BLOCK // 4))
        run = Check(pool)
        told = run.total
        shares(run)
        assert run.done == pytest.approx(told, rel=0.05)


def test_the_contents_of_a_check_count_as_the_time_that_they_take(pool: Pool) -> None:
    """Four fifths of it and more, though they are a tenth of the things looked at."""
    decoded = [share for result, share in shares(Check(pool)) if result.objects_checked < OBJECTS]
    assert decoded[-1] > 0.8
    assert decoded[len(decoded) // 2] == pytest.approx(decoded[-1] / 2, rel=0.1)


def test_a_recompression_is_done_when_its_last_object_is_encoded_and_not_when_clones_were_walked(pool: Pool) -> None:
    told = shares(Recompress(pool))
    encoding = [share for result, share in told if 0 < result.objects_seen < OBJECTS]
    assert encoding[-1] > 0.95
    assert encoding[len(encoding) // 2] == pytest.approx(0.5, abs=0.05)
    assert told[-1][1] == 1.0


def test_a_recompression_expects_only_what_no_run_as_strong_has_tried(pool: Pool) -> None:
    shares(Recompress(pool))
    again = Recompress(pool)
    expected = [again.total]
    while again.step(STEP):
        expected.append(again.total)
    walked = OBJECTS * (1 + CLONES)
    assert max(expected) == again.done
    assert 0 <= again.done - (walked + OBJECTS) < AT_HAND  # every entry, after every cell


def test_blocks_that_do_not_rest_leave_the_total_when_they_are_passed_over(pool: Pool) -> None:
    """Half of the blocks rest; the share goes its way as if only they had been there."""
    pool.set_clock(10_000)
    disk = next(disk for disk in pool.disks() if disk.name == "disk")
    for number in range(0, OBJECTS, 2):
        disk.read(number * BLOCK, BLOCK)
    run = Recompress(pool, idle_seconds=1000)
    told = shares(run)
    seen = run.report().objects_seen
    assert 0 < seen < OBJECTS
    encoded = [share for result, share in told if result.objects_seen >= seen]
    assert encoded[0] > 0.95


def test_raw_objects_alone_are_expected_of_a_run_for_huge_ones(pool: Pool) -> None:
    run = Recompress(pool, huge_only=True)
    shares(run)
    assert 0 <= run.total - (OBJECTS * (1 + CLONES) + OBJECTS) < AT_HAND


def test_objects_that_come_during_a_run_make_its_total_grow(pool: Pool) -> None:
    run = Recompress(pool)
    while run.step(STEP) and not run.report().objects_seen:
        pass
    disk: Disk = pool.create("late", OBJECTS * BLOCK)
    for number in range(OBJECTS):
        disk.write(number * BLOCK, half_random(number + OBJECTS))
    assert all(share <= 1.0 for _, share in shares(run))


def test_what_goes_during_a_run_leaves_its_total_at_the_end(pool: Pool) -> None:
    run = Recompress(pool)
    while run.step(STEP) and not run.report().objects_seen:
        pass
    for disk in pool.disks():
        disk.trim(0, OBJECTS * BLOCK)
    shares(run)
    assert run.total == run.done


def test_a_step_through_blocks_that_each_repeat_one_word_is_as_short_as_any() -> None:
    """There is nothing to encode, but there may be any number of them: a client that finds no room waits for a step."""
    pool = Pool()
    disk = pool.create("disk", 4 * LEAF_BLOCKS * BLOCK)
    disk.zero(0, disk.size_bytes, no_hole=True)
    run = Recompress(pool)
    steps = 0
    while run.step(4):
        steps += 1
    assert steps >= 4 * LEAF_BLOCKS // HOLD_COUNT // 4
    assert (run.done, run.report().objects_seen) == (run.total, 0)
