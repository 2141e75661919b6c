"""Who has clients and disks that nobody else has any more goes on, whatever else cannot be had."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.server.handover import Handover
from tests.support.server import START_SECONDS
from tests.support.takeover import Line, ask, beating, ends_when_it_is_to_take, listening

pytestmark = pytest.mark.interop

FAILURES = 8


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path, in_memory=True)
    yield made
    made.last.stop()


def test_who_took_over_goes_on_where_it_cannot_write_its_number(tmp_path: Path) -> None:
    """It finds out when the other server has left, and disks in memory are its alone."""
    line = Line(tmp_path, in_memory=True)
    with beating(line) as beater:
        line.take_over(["--pidfile", str(tmp_path / "gone" / "pid")])
        beater.beat()
        line.last.wait_until(lambda: "cannot write the process's number" in line.last.log, START_SECONDS)
        beater.beat()
    assert line.attached() == 1
    line.last.stop()


def test_who_goes_on_alone_does_so_without_a_number(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    line = Line(tmp_path, ["--pidfile", str(place / "pid")], in_memory=True)
    with beating(line) as beater, listening(line.directory / "s") as listener:
        ask(line, line.directory / "s")
        with listener.accept()[0] as giver:
            taken = Handover.take(giver)
            place.rmdir()  # it was there while the server served
            taken.close()
        line.last.wait_until(lambda: "cannot write the process's number" in line.last.log, START_SECONDS)
        beater.beat()
    assert line.attached() == 1
    line.last.stop()


def test_takeovers_that_fail_leave_nothing_behind(line: Line) -> None:
    """Neither descriptors nor threads, of which a unit has a number, nor mappings: pages that one holds stay when their
    pool is removed, and each takes as many addresses as a pool may ever have.
    """
    process = Path(f"/proc/{line.last.pid}")
    descriptors, threads = [], []

    def goes_on(times: int) -> bool:
        return line.last.log.count("going on") == times

    with beating(line) as beater:
        for count in range(1, FAILURES + 1):
            ends_when_it_is_to_take(line, line.directory / f"s{count}")
            line.last.wait_until(functools.partial(goes_on, count), START_SECONDS)
            beater.beat()
            assert line.last.command_line("stat").returncode == 0
            descriptors.append(len(list((process / "fd").iterdir())))
            threads.append(len(list((process / "task").iterdir())))
    line.last.wait_until(lambda: (process / "maps").read_text().count("/memfd:nbdzram-") == 1, START_SECONDS)
    assert descriptors[-1] <= descriptors[0]
    assert threads[-1] < threads[0] + FAILURES // 2  # asyncio's own come as they are needed, and stay
