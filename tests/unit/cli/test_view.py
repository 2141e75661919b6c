"""The screen of `nbdzram top`: what it tells, and that it fits the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from nbdzram.cli.view import SORTS, Frame, duration, screen
from nbdzram.rates import Rates
from nbdzram.status import ServerStatus
from tests.unit.records import EXPORT, MIB, POOL_STATS, RUNNING, USAGE
from tests.unit.records import SERVER as RECORDED

(POOL,) = RECORDED.pools
SERVER = replace(RECORDED, pools=(replace(POOL, scrub=replace(POOL.scrub, rotten_blocks=0)),))
"""Nothing is wrong with it."""


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
        (4 * MIB - (256 << 10), 4 * MIB, "pool default is nearly full"),
        (64 * MIB + (100 << 10), 64 * MIB, "pool default is full"),
        (70 * MIB, 64 * MIB, "pool default is above its limit"),
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


@pytest.mark.parametrize(("used", "told"), [(9.99, "999 % of 1M"), (15.94, "15.9 times 1M")])
def test_many_times_a_limit_is_told_as_that(used: float, told: str) -> None:
    stats = replace(POOL_STATS, mem_used_total=int(used * MIB), metadata=0, mem_limit=MIB)
    lines = shown(Frame(replace(SERVER, pools=(replace(SERVER.pools[0], stats=stats),))))
    assert next(line for line in lines if line.startswith("default")).endswith(f" {told}")


@pytest.mark.parametrize("width", [60, 70, 80])
def test_the_whole_legend_is_read_in_a_narrow_terminal(width: int) -> None:
    lines = shown(Frame(SERVER), width)
    (legend,) = (line for line in lines if "objects 100M" in line)
    assert legend.endswith("folded away 40M" if width > 60 else "folded 40M")


NOW = SERVER.started_at + SERVER.uptime_seconds
DAY = 86400
assert SERVER.journal is not None
assert SERVER.checkpoint is not None
JOURNAL, CHECKPOINT = SERVER.journal, SERVER.checkpoint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"certificate_expires_at": NOW - 1}, "the certificate has expired"),
        ({"certificate_expires_at": NOW + 3 * DAY + 60}, "certificate ends in 3 d 0 h"),
        ({"certificate_expires_at": NOW + 15 * DAY}, "serving"),
        ({"tls_files_usable": False}, "TLS files cannot be used"),
        ({"connections": 90, "connections_limit": 100}, "connections near their limit"),
        ({"connections": 100, "connections_limit": 100}, "connections at their limit"),
        ({"state_dir_size_bytes": 1000, "state_dir_free_bytes": 9}, "the state directory is full"),
        ({"state_dir_size_bytes": 1000, "state_dir_free_bytes": 49}, "state directory nearly full"),
        ({"state_dir_size_bytes": 1000, "state_dir_free_bytes": 51}, "serving"),
        ({"state_dir_size_bytes": 1000, "state_dir_free_bytes": 9, "draining": True}, "draining"),
        ({"starting": True}, "starting"),
        ({"pools": RECORDED.pools}, "pool default has rotten blocks"),
        (
            {"pools": (replace(POOL, scrub=replace(POOL.scrub, rotten_blocks=0, finished_at=None)),)},
            "pool default has rot",
        ),
        ({"journal": replace(JOURNAL, usable=False)}, "FLUSH waits for a checkpoint"),
        ({"journal": replace(JOURNAL, held_back=("disk", "other"))}, "FLUSH of disk fails"),
        ({"journal": replace(JOURNAL, usable=False, trouble="no space left on device")}, "FLUSH fails"),
        ({"journal": replace(JOURNAL, trouble="FLUSH waits for the disk")}, "FLUSH waits for a disk"),
        ({"checkpoint": replace(CHECKPOINT, moment=NOW - 361)}, "the newest checkpoint is old"),
        ({"checkpoint": replace(CHECKPOINT, moment=NOW - 359)}, "serving"),
        ({"checkpoint": replace(CHECKPOINT, held_back=("disk", "other"))}, "checkpoints lack disk"),
        ({"checkpoint": replace(CHECKPOINT, moment=None)}, "serving"),
        ({"checkpoint": replace(CHECKPOINT, moment=None), "uptime_seconds": 361}, "the newest checkpoint is old"),
        ({"checkpoint": replace(CHECKPOINT, moment=None), "uptime_seconds": 361, "exports": ()}, "serving"),
    ],
)
def test_what_the_status_page_calls_trouble_stands_in_the_first_line(change: dict[str, Any], told: str) -> None:
    quiet = replace(SERVER, certificate_expires_at=None, state_dir_size_bytes=0, headroom=None, connections=1)
    assert f"  {told}" in shown(Frame(replace(quiet, **change)), 100)[0]


def test_of_several_troubles_the_worst_is_told() -> None:
    (pool,) = SERVER.pools
    full = replace(pool.stats, mem_limit=pool.stats.memory_used)
    status = replace(SERVER, tls_files_usable=False, pools=(replace(pool, stats=full),))
    assert "  pool default is full  up " in shown(Frame(status))[0]


def test_writes_that_were_refused_are_counted_under_the_header() -> None:
    assert shown(Frame(SERVER))[1].endswith("folded away 40M  refused 2 writes")
    pool = replace(SERVER.pools[0], stats=replace(POOL_STATS, failed_writes=0))
    assert "refused" not in shown(Frame(replace(SERVER, pools=(pool,))))[1]


def test_of_many_pools_those_near_their_limits_and_the_largest_are_shown() -> None:
    small, large = (replace(POOL_STATS, mem_used_total=size, mem_limit=0) for size in (MIB, 90 * MIB))
    near = replace(POOL_STATS, mem_used_total=2 * MIB, metadata=0, mem_limit=2 * MIB + (200 << 10))
    kinds = {"a": small, "b": large, "c": small, "d": near, "e": small, "f": large}
    pools = tuple(replace(SERVER.pools[0], name=name, stats=stats) for name, stats in kinds.items())
    lines = shown(Frame(replace(SERVER, pools=pools)))
    assert [line.split()[0] for line in lines[3:7]] == ["b", "d", "f", "and"]


@pytest.mark.parametrize("height", range(8, 24))
def test_a_low_terminal_shows_exports_and_keys_all_the_same(height: int) -> None:
    """Blank lines go first, then traffic, then pools: exports are what is looked for."""
    pools = tuple(replace(SERVER.pools[0], name=name) for name in ("one", "two"))
    status = replace(with_exports("a", "b", "c", "d", "e", "f", "g"), pools=pools)
    lines = shown(Frame(status), 80, height)
    assert len(lines) == height
    assert lines[-1].startswith("q quit")
    assert sum("1G" in line for line in lines) >= 2
    assert any("ratio" in line for line in lines)
    assert any(line.startswith("one") for line in lines) == (height >= 10)
    assert any(line.startswith("written") for line in lines) == (height >= 13)


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (82, "recompress of default: 50 %, 3 min 20 s left, 1 waiting"),
        (64, "recompress of default: 50 %, 1 waiting"),
        (46, "recompress: 50 %"),
        (30, ""),
    ],
)
def test_a_run_under_way_is_told_in_a_narrow_terminal_too(width: int, told: str) -> None:
    run = replace(RUNNING, kind="recompress", pool="default", done=1, total=2, seconds_left=200.0)
    maintenance = replace(SERVER.pools[0].maintenance, queue=(run, replace(run, state="waiting")))
    status = replace(SERVER, pools=(replace(SERVER.pools[0], maintenance=maintenance),))
    assert shown(Frame(status), width)[-1].removeprefix("q quit   s sort: traffic").strip() == told


def test_printed_once_a_run_under_way_is_told_behind_the_exports() -> None:
    """In a pipe there is no line of keys: the run went with it."""
    assert shown(Frame(SERVER), keys=False)[-1].startswith(EXPORT.name)
    run = replace(RUNNING, kind="recompress", pool="default", done=1, total=2, seconds_left=None)
    maintenance = replace(SERVER.pools[0].maintenance, queue=(run,))
    status = replace(SERVER, pools=(replace(SERVER.pools[0], maintenance=maintenance),))
    assert shown(Frame(status), keys=False)[-2:] == ["", "recompress of default: 50 %"]


def test_blanks_at_the_ends_of_a_name_are_seen_as_lists_show_them() -> None:
    assert any(line.startswith("\\x20a b\\x20 ") for line in shown(Frame(with_exports(" a b "))))
