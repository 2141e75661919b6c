"""Who has clients and disks that nobody else has any more goes on, whatever else cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.server.handover import Handover
from tests.interop.test_takeover import Line, ask, beating, listening
from tests.support.server import START_SECONDS

pytestmark = pytest.mark.interop


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
