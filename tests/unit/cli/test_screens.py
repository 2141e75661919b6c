"""What `nbdzram top` draws of servers in which no figure is another one's, line by line: screens.txt has it.

python -m tests.unit.cli.test_screens        writes it anew, after a change that is meant
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nbdzram.cli.view import HISTORY, SORTS, Frame, duration, screen
from nbdzram.engine.stats import DiskUsage, PoolStats
from nbdzram.rates import Rates, between
from nbdzram.status import ExportStatus, OperationStatus, PoolStatus
from nbdzram.thresholds import KEPT_BYTES
from tests.unit.records import EXPORT, MIB, OTHER_POOL, POOL_STATS, RUNNING, TWO_OF_EACH, WAITING

SCREENS = Path(__file__).with_name("screens.txt")
WELL = replace(
    TWO_OF_EACH,
    pools=tuple(
        replace(pool, scrub=replace(pool.scrub, rotten_blocks=0), stats=replace(pool.stats, blocks_rotten=0))
        for pool in TWO_OF_EACH.pools
    ),
)
BUSY, QUIET = Rates(3 * MIB, MIB, 1024.4, 6e-6, 2.34e-3), Rates(17 * MIB + 5, 0.7, 3.6, 0.0, 0.98)
USED = {
    "disk": DiskUsage(stored=400 * MIB, same_filled=5, compressed=120 * MIB, unique=90 * MIB, shared=31 * MIB, huge=7),
    "other": DiskUsage(stored=900 * MIB, same_filled=1, compressed=9 * MIB, unique=2 * MIB, shared=3 * MIB, huge=8),
}
PAST = deque((Rates(at * at * MIB, (60 - at) * MIB, float(at % 7)) for at in range(HISTORY)), maxlen=HISTORY)
NOW = WELL.started_at + WELL.uptime_seconds
DAY = 86400


def drawn(frame: Frame, width: int, height: int, *, keys: bool = True, encoding: str = "utf-8") -> list[str]:
    console = Console(width=width, height=height, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(screen(frame, width, height, keys=keys, encoding=encoding))
    return [f"{line}|" for line in captured.get().splitlines()]


def styles(frame: Frame, width: int, height: int) -> Iterator[str]:
    """Each stretch of a screen that has a colour, or is bold."""
    for line in screen(frame, width, height, keys=True).renderables:
        assert isinstance(line, Text)
        yield "  ".join(f"{span.style}({line.plain[span.start : span.end].strip()})" for span in line.spans)


def exports(*stored: int) -> tuple[ExportStatus, ...]:
    """Which differ in all by which they can be ordered."""
    return tuple(
        replace(EXPORT, name=f"disk-{'n' * (at * 4)}-{at}", stored_bytes=size * MIB, connections=at % 3)
        for at, size in enumerate(stored)
    )


def pools(*kinds: tuple[str, int, int]) -> tuple[PoolStatus, ...]:
    """By name, with so many MiB and such a limit."""
    return tuple(
        replace(
            WELL.pools[0],
            name=name,
            stats=replace(
                POOL_STATS,
                mem_used_total=used * MIB,
                compr_data_size=used * MIB // 2,
                shared_bytes=at * MIB,
                metadata=at << 16,
                mem_limit=limit * MIB,
            ),
        )
        for at, (name, used, limit) in enumerate(kinds)
    )


def whole() -> Iterator[tuple[str, list[str]]]:
    """Screens."""
    frame = Frame(WELL, BUSY, {"disk": BUSY, "other": QUIET}, USED, PAST)
    for width, height in ((132, 26), (80, 24), (80, 14), (80, 11), (66, 24), (50, 20), (34, 12), (24, 12)):
        yield f"{width} columns, {height} lines", drawn(frame, width, height)
    yield "in a pipe", drawn(frame, 80, 102, keys=False)
    yield "in ASCII", drawn(frame, 80, 24, encoding="ascii")
    yield "colours", list(styles(frame, 80, 24))
    yield "colours, alone", list(styles(Frame(replace(WELL, exports=(), uris=())), 80, 24))
    yield "nothing yet", drawn(Frame(replace(WELL, exports=(), uris=(), connections=1)), 80, 24)
    many = exports(5, 9, 2, 7, 7, 1, 0)
    traffic = {one.name: Rates(float(at % 4), float(at % 3), float(at % 5)) for at, one in enumerate(many)}
    for sort in SORTS:
        yield f"by {sort}", drawn(Frame(replace(WELL, exports=many), rates=traffic, sort=sort), 80, 24)[-13:-4]
    for count in (4, 5, 9):
        some = pools(*[(f"pool{at}", 50 * at % 70, 71 * (at != 2)) for at in range(count)])
        yield f"{count} pools", drawn(Frame(replace(WELL, pools=some, exports=many)), 80, 16)
    wide = pools(("a name of many more letters", 900, 64), ("b", 0, 0), ("仮想マシン", 640, 64), ("d", 639, 64))
    yield "a pool many times as large", drawn(Frame(replace(WELL, pools=wide)), 80, 24)[3:9]
    small = replace(POOL_STATS, mem_used_total=5, compr_data_size=1, metadata=3, shared_bytes=0, mem_limit=0)
    yield "a small pool", drawn(Frame(replace(WELL, pools=(replace(WELL.pools[0], stats=small),))), 80, 24)[1:6]
    for done, total, left, state in ((1, 3, 62.0, "running"), (9, 3, None, "running"), (1, 0, 5.0, "paused")):
        run = replace(RUNNING, done=done, total=total, seconds_left=left, state=state)
        queue = replace(OTHER_POOL.maintenance, queue=(run, WAITING, WAITING))
        at_work = replace(WELL, pools=(WELL.pools[0], replace(WELL.pools[1], maintenance=queue), OTHER_POOL))
        for width in (100, 60, 45):
            yield f"{state}, {width} columns", drawn(Frame(at_work), width, 24)[-1:]


def first_line(**changed: Any) -> str:
    """What a server with this is called."""
    well = replace(WELL, headroom=None, certificate_expires_at=None, state_dir_size_bytes=0, connections=0)
    line = drawn(Frame(replace(well, **changed)), 132, 24)[0]
    return line.removeprefix("nbdzram 0.1.0  ").partition("  up ")[0]


def filled(used: int, limit: int) -> tuple[PoolStatus, ...]:
    stats: PoolStats = replace(POOL_STATS, mem_used_total=used - MIB, metadata=MIB, mem_limit=limit)
    return (WELL.pools[1], replace(WELL.pools[0], name="a name of many more letters", stats=stats))


def troubles() -> Iterator[str]:
    """Each on both sides of where it begins."""
    limit = 1000 * MIB
    least = (limit // 200, KEPT_BYTES)
    for used in (limit * 9 // 10 - 1, limit * 9 // 10, *(limit - room + one for room in least for one in (-1, 0, 1))):
        yield f"{used} of {limit}: {first_line(pools=filled(used, limit))}"
    for used in (limit * 201 // 200, limit * 201 // 200 + 1):
        yield f"{used} of {limit}: {first_line(pools=filled(used, limit))}"
    for limit in (MIB, 2 * MIB, 20 * MIB):
        for room in (limit // 5, KEPT_BYTES, limit // 200):
            for one in (-1, 0, 1):
                yield f"{room + one} of {limit} are left: {first_line(pools=filled(limit - room - one, limit))}"
    yield f"no limit: {first_line(pools=filled(limit, 0))}"
    for seconds in (-1, 0, 1, 14 * DAY - 1, 14 * DAY):
        yield f"a certificate, {seconds} s: {first_line(certificate_expires_at=NOW + seconds)}"
    for connections in (899, 900, 999, 1000):
        yield f"{connections} of 1000: {first_line(connections=connections, connections_limit=1000)}"
    for free in (0, 9, 10, 49, 50, 51):
        yield f"{free} of 1000: {first_line(state_dir_size_bytes=1000, state_dir_free_bytes=free)}"


def states() -> Iterator[str]:
    """Each alone, and which of several is told."""
    assert WELL.checkpoint is not None
    assert WELL.journal is not None
    assert TWO_OF_EACH.headroom is not None
    for age in (359, 360, 361):
        late = replace(WELL.checkpoint, moment=NOW - age)
        yield f"a checkpoint, {age} s: {first_line(checkpoint=late)}"
        late = replace(WELL.checkpoint, moment=None)
        yield f"no checkpoint, {age} s: {first_line(checkpoint=late, uptime_seconds=float(age))}"
    names = ("a name of many more letters", "disk")
    (scrub, stats) = (WELL.pools[0].scrub, replace(POOL_STATS, blocks_rotten=1))
    for rotten, looked in ((0, 1.0), (0, None), (1, 1.0), (1, None)):
        pool = replace(WELL.pools[1], stats=stats, scrub=replace(scrub, rotten_blocks=rotten, finished_at=looked))
        yield f"{rotten} rotten, looked {looked}: {first_line(pools=(WELL.pools[0], pool))}"
    changes: dict[str, dict[str, Any]] = {
        "draining": {"draining": True},
        "starting": {"starting": True},
        "short of memory": {"headroom": replace(TWO_OF_EACH.headroom, short=True)},
        "room": {"headroom": TWO_OF_EACH.headroom},
        "journal": {"journal": replace(WELL.journal, trouble="it failed", usable=False)},
        "journal's disk": {"journal": replace(WELL.journal, trouble="it waits")},
        "journal held back": {"journal": replace(WELL.journal, held_back=names)},
        "checkpoint": {"checkpoint": replace(WELL.checkpoint, held_back=names)},
        "checkpoint damaged": {"checkpoint": replace(WELL.checkpoint, damaged_files=2)},
        "journal waits": {"journal": replace(WELL.journal, usable=False)},
        "TLS files": {"tls_files_usable": False},
        "neither": {"journal": None, "checkpoint": None},
    }
    for name, change in changes.items():
        yield f"{name}: {first_line(**change)}"
    full = pools(("near", 61, 66), ("full", 66, 66), ("over", 67, 66))
    worst: list[dict[str, Any]] = [
        changes["draining"],
        changes["starting"],
        changes["short of memory"],
        {"pools": (*full, pool)},
        {"journal": replace(WELL.journal, trouble="it failed", held_back=names, usable=False)},
        {"certificate_expires_at": NOW - 1, "tls_files_usable": False},
        {"connections": 1000, "connections_limit": 1000},
        changes["checkpoint"],
        {"state_dir_size_bytes": 1000, "state_dir_free_bytes": 0},
    ]
    while worst:
        together = {name: value for change in worst for name, value in change.items()}
        yield f"all of these, from {', '.join(worst.pop(0))}: {first_line(**together)}"
    for one, next_one in pairwise(full):
        yield f"{one.name} and {next_one.name}: {first_line(pools=(one, next_one))}"


def figures() -> Iterator[str]:
    """Numbers for people, on both sides of where they change their form."""
    edges = (-1.0, 0.0, 1e-7, 4.5e-7, 34.4e-6, 0.9994e-3, 0.9996e-3, 0.00994, 0.00996, 0.9994, 0.9996, 61.25)
    yield " ".join(duration(seconds) for seconds in edges)
    bounds = WELL.latency_bounds_seconds
    before = replace(WELL, uptime_seconds=50.0)
    for counts in ((0, 0, 0), (1, 0, 0), (50, 50, 0), (10, 89, 1), (10, 80, 10), (0, 0, 7)):
        told = OperationStatus(1000, 999, {}, tuple(30 + one for one in counts[:1]) + counts[1:], 0.5)
        export = replace(WELL.exports[0], operations={"read": told, "write": told, "trim": replace(told, requests=7)})
        old = replace(export, operations={"read": replace(told, requests=400, bytes=200, latency_counts=(30, 0, 0))})
        rates = between(replace(before, exports=(old,)), replace(WELL, exports=(export, WELL.exports[1])))
        yield f"{counts} in {bounds}: {rates}"


def lines() -> Iterator[str]:
    for title, shown in whole():
        yield from (f"-- {title}", *shown)
    yield "-- troubles"
    yield from troubles()
    yield from states()
    yield "-- figures"
    yield from figures()


def test_each_screen_is_drawn_as_it_was() -> None:
    assert list(lines()) == SCREENS.read_text(encoding="utf-8").splitlines()


def test_the_server_of_these_is_well() -> None:
    """Or else a trouble that begins would be hidden behind another one."""
    assert first_line() == "serving"


if __name__ == "__main__":
    SCREENS.write_text("\n".join(lines()) + "\n", encoding="utf-8")
