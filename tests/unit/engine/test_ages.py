"""Ages outlive process and machine, and never look younger because they grew old."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from tests.unit.engine.blocks import BLOCK, prose, run

MINUTE, HOUR, DAY = 60, 3600, 86400
NOW = 1_790_000_000  # a clock as time.time() has it


def seen(pool: Pool, idle_seconds: int) -> int:
    return run(Recompress(pool, idle_seconds=idle_seconds)).objects_seen


def test_ages_survive_the_process_and_the_machine(tmp_path: Path) -> None:
    """A clock that begins with the machine would have made the fresh blocks old, or the old ones fresh."""
    path = str(tmp_path / "arena")
    with Pool(path=path, clock=NOW) as pool:
        disk = pool.create("disk", 1 << 20)
        disk.write(0, b"".join(prose(number) for number in range(10)))
        pool.set_clock(NOW + 2 * HOUR)
        disk.write(10 * BLOCK, prose(10))
    with Pool(path=path, clock=NOW + 2 * HOUR + 10 * MINUTE) as pool:
        assert seen(pool, 3 * HOUR) == 0
        assert seen(pool, HOUR) == 10
        assert seen(pool, 9 * MINUTE) == 1


@pytest.mark.parametrize("idle", [1, 59, 60, 61, 3600])
def test_nothing_is_taken_before_it_rested_as_long_as_was_asked(idle: int) -> None:
    for second in (0, 1, 59):
        pool = Pool(clock=NOW + second)
        pool.create("disk", 1 << 20).write(0, prose(1))
        pool.set_clock(NOW + second + idle - 1)
        assert seen(pool, idle) == 0
        pool.set_clock(NOW + second + idle + 2 * MINUTE)
        assert seen(pool, idle) == 1


def test_a_clock_that_is_set_back_makes_nothing_old() -> None:
    pool = Pool(clock=NOW)
    pool.create("disk", 1 << 20).write(0, prose(1))
    for back in (MINUTE, HOUR, DAY):
        pool.set_clock(NOW - back)
        assert seen(pool, MINUTE) == 0


@pytest.mark.parametrize("days", [19, 20, 22, 23, 45, 100])
def test_what_is_old_stays_old_however_long_a_server_runs(days: int) -> None:
    """15 bits of minutes are 22 days; the clock is told each second, and an hour at a time here."""
    pool = Pool(clock=NOW)
    pool.create("disk", 1 << 20).write(0, prose(1))
    for hour in range(days * 24):
        pool.set_clock(NOW + hour * HOUR)
    assert seen(pool, 18 * DAY) == 1


def test_more_days_than_ages_have_mean_the_oldest() -> None:
    pool = Pool(clock=NOW)
    pool.create("disk", 1 << 20).write(0, prose(1))
    for hour in range(21 * 24):
        pool.set_clock(NOW + hour * HOUR)
    assert seen(pool, 365 * DAY) == 1
