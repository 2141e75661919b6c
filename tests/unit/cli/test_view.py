"""The screen of `nbdzram top`: what it tells, and that it fits the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from nbdzram.cli.view import SORTS, Frame, duration, screen
from nbdzram.rates import Rates
from nbdzram.status import ServerStatus
from tests.unit.records import EXPORT, MIB, POOL_STATS, SERVER, USAGE


def shown(frame: Frame, width: int = 80, height: int = 24, *, keys: bool = True) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(screen(frame, width, height, keys=keys))
    return captured.get().splitlines()


def with_exports(*names: str) -> ServerStatus:
    return replace(SERVER, exports=tuple(replace(EXPORT, name=name) for name in names))


def test_everything_that_was_asked_for_is_on_one_screen() -> None:
    busy = Rates(read_bytes=3 * MIB, write_bytes=MIB, requests=1024, median_seconds=6e-6, p99_seconds=2e-3)
    lines = shown(Frame(SERVER, all_rates=busy, rates={"disk": busy}, usage={"disk": USAGE}))
    text = "\n".join(lines)
    for told in ("serving", "2 connections", "stored 400M", "in memory 113M", "ratio 3.54", "folded away 40M"):
        assert told in text, told
    assert "22 % of 512M" in text
    assert "objects 100M" in text
    assert "fragmentation 10M" in text
    assert "metadata 3M" in text
    (row,) = (line.split() for line in lines if line.startswith("disk "))
    assert row == ["disk", "1G", "400M", "3.33", "25", "%", "3M", "1M", "1024", "2.0", "ms", "2"]
    assert lines[-1].startswith("q quit   s sort: traffic")


@pytest.mark.parametrize(
    ("used", "limit", "told"),
    [
        (50 * MIB, 64 * MIB, "serving"),
        (64 * MIB - (256 << 10), 64 * MIB, "pool default is full"),
        (4 * MIB - (192 << 10), 4 * MIB, "pool default is full"),  # what is kept for making room is most of it
        (4 * MIB - (256 << 10), 4 * MIB, "serving"),
        (70 * MIB, 64 * MIB, "pool default is full"),
        (70 * MIB, 0, "serving"),
    ],
)
def test_a_full_pool_is_told_in_the_first_line(used: int, limit: int, told: str) -> None:
    (pool,) = SERVER.pools
    stats = replace(pool.stats, mem_used_total=used - MIB, metadata=MIB, mem_limit=limit)
    lines = shown(Frame(replace(SERVER, pools=(replace(pool, stats=stats),))), 60)
    assert f"  {told}  up " in lines[0]


@pytest.mark.parametrize("size", [(80, 24), (60, 16), (132, 50), (20, 5)])
@pytest.mark.parametrize("count", [0, 1, 12, 40])
def test_the_screen_fits_the_terminal(size: tuple[int, int], count: int) -> None:
    width, height = size
    status = with_exports(*(f"a machine with a very long name, number {number}" for number in range(count)))
    lines = shown(Frame(status), width, height)
    assert all(cell_len(line) <= max(width, 70) for line in lines)
    if height >= 16:
        assert len(lines) == height
    if (width, height, count) == (80, 24, 40):
        assert "and 29 more" in lines[-2]


def test_columns_stay_apart_for_disks_that_are_nearly_empty() -> None:
    usage = replace(USAGE, stored=400 * MIB, compressed=3 * MIB)
    (row,) = (line for line in shown(Frame(SERVER, usage={"disk": usage})) if line.startswith("disk "))
    assert row.split()[2:4] == ["400M", "133"]


def test_long_names_stay_distinct() -> None:
    lines = shown(
        Frame(with_exports("virtual-machine-disk-01", "virtual-machine-disk-02", "仮想マシンのディスク第一号です"))
    )
    names = {line[:19] for line in lines if "1G" in line}
    assert len(names) == 3
    assert all(cell_len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (80, "EXPORT SIZE STORED RATIO SHARED READ/s WRITE/s IOPS P99 CONN"),
        (70, "EXPORT STORED RATIO READ/s WRITE/s IOPS P99 CONN"),
        (60, "EXPORT STORED READ/s WRITE/s IOPS P99"),
        (48, "EXPORT STORED READ/s WRITE/s IOPS"),
    ],
)
def test_in_a_narrow_terminal_columns_leave_before_names_do(width: int, headings: str) -> None:
    lines = shown(Frame(with_exports("virtual-machine-disk-01")), width)
    at = next(number for number, line in enumerate(lines) if line.startswith("EXPORT"))
    assert lines[at].split() == headings.split()
    assert len(lines[at + 1].split()) == len(headings.split())
    assert lines[at + 1].startswith("virtual")


@pytest.mark.parametrize("sort", SORTS)
def test_each_order_puts_its_highest_first(sort: str) -> None:
    low = replace(EXPORT, name="b", stored_bytes=1, connections=0)
    high = replace(EXPORT, name="a", stored_bytes=2, connections=5)
    rates = {"a": Rates(read_bytes=10, requests=2), "b": Rates(read_bytes=5, requests=1)}
    lines = shown(Frame(replace(SERVER, exports=(low, high)), rates=rates, sort=sort))
    assert [line[0] for line in lines if "1G" in line] == ["a", "b"]


def test_more_pools_than_fit_are_counted_and_the_legend_adds_them_all_up() -> None:
    pools = tuple(replace(SERVER.pools[0], name=f"pool{number}") for number in range(6))
    lines = shown(Frame(replace(SERVER, pools=pools)))
    assert [line.split()[0] for line in lines[3:7]] == ["pool0", "pool1", "pool2", "and"]
    assert "and 3 pools more" in lines[6]
    assert "objects 600M" in lines[7]


def test_a_small_share_of_a_large_limit_is_still_seen() -> None:
    stats = replace(POOL_STATS, mem_limit=1 << 40)
    pool = replace(SERVER.pools[0], stats=stats)
    (bar,) = (line for line in shown(Frame(replace(SERVER, pools=(pool,)))) if line.startswith("default"))
    assert bar.count("█") == 3  # objects, fragmentation, metadata
    assert bar.count("░") == 1


def test_the_tables_of_an_empty_pool_do_not_fill_its_bar() -> None:
    empty = replace(POOL_STATS, mem_limit=0, compr_data_size=0, mem_used_total=0, shared_bytes=0, metadata=28 << 10)
    pool = replace(SERVER.pools[0], stats=empty)
    (bar,) = (line for line in shown(Frame(replace(SERVER, pools=(pool,)))) if line.startswith("default"))
    assert bar.count("█") <= 2


def test_durations_are_short() -> None:
    assert [duration(s) for s in (0, 34e-6, 0.0012, 0.05, 3.25)] == ["-", "34 µs", "1.2 ms", "50 ms", "3.2 s"]
