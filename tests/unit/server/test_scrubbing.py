"""Rot is looked for by itself, at a pace of its own, and named to whoever should know."""

from __future__ import annotations

import asyncio
import logging
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig, MaintenanceConfig, ServerConfig
from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import CheckReport, VerifyReport
from nbdzram.engine.stats import PoolStats
from nbdzram.errors import CheckFailed, UserError
from nbdzram.server import service as service_module
from nbdzram.server.maintenance import Maintenance
from nbdzram.server.scrubbing import Checking, Scrubs, ranges_of
from nbdzram.server.service import Service
from nbdzram.status import RunOptions
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random, run
from tests.unit.engine.test_scrub import bend
from tests.unit.server.house import Delegate
from tests.unit.server.lasting import play

MIB = 1 << 20


def test_blocks_are_told_by_ranges_and_what_is_beyond_is_counted() -> None:
    assert ranges_of([("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 9)], 5) == (
        "blocks 1 to 3 of export 'a', block 4 of export 'b', block 9 of export 'b'"
    )
    assert ranges_of([("a", 2 * number) for number in range(25)], 100).endswith("block 38 of export 'a' and 80 more")


def test_a_check_names_every_block_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.create("disk", MIB).write(0, half_random(1) + half_random(2))
        pool.create("other", MIB).write(5 * BLOCK, half_random(3, 1000))
        scrubs = Scrubs("default", pool)
        report: VerifyReport = run(scrubs.begin_check())  # type: ignore[arg-type]
        assert report.objects_checked == 3
        assert report.changing == 0
        bend(path, 1)
        bend(path, 3)
        with pytest.raises(CheckFailed, match="block 0 of export 'disk', block 5 of export 'other'"):
            run(scrubs.begin_check())  # type: ignore[arg-type]


def test_a_check_tells_what_both_of_its_parts_found(tmp_path: Path) -> None:
    """Each figure at its place: what clients changed meanwhile only the recount knows."""
    with Pool(path=str(tmp_path / "arena")) as pool:
        pool.create("disk", MIB).write(0, half_random(1) + half_random(2) + b"8 bytes!" * 512)
        check = Scrubs("default", pool).begin_check()
        assert isinstance(check, Checking)
        check._recount = Delegate(check._recount, report=lambda: CheckReport(objects_checked=11, changing=7))  # type: ignore[assignment]
        assert run(check) == VerifyReport(  # type: ignore[arg-type]
            objects_checked=2, changing=7, objects_rotten=0, blocks_checked=MIB // BLOCK, blocks_rotten=0
        )


def test_a_check_tells_rot_and_what_else_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.create("disk", MIB).write(0, half_random(1) + half_random(2))
        bend(path, 1)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            arena.set_word(arena.cell(2), arena.word(arena.cell(2)) + (1 << 55))  # one holder that there is not
        check = Scrubs("default", pool).begin_check()
        assert isinstance(check, Checking)
        with pytest.raises(CheckFailed, match="not what was written: block 0 of export 'disk'; and "):
            run(check)  # type: ignore[arg-type]
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            arena.set_word(arena.cell(2), arena.word(arena.cell(2)) - (1 << 55))


@pytest.fixture
def rotting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Service]:
    """A server whose only block is not what was written, and that looks for such."""
    monkeypatch.setattr(service_module, "TICK_SECONDS", 0.01)
    with Pool(path=str(tmp_path / "default.pool")) as pool:
        pool.create("disk", MIB).write(0, half_random(1))
    bend(tmp_path / "default.pool", 1)
    return lambda: Service(
        ServerConfig(
            exports=(ExportConfig(name="disk", size_bytes=MIB),),
            tcp=(),
            state_dir=tmp_path,
            maintenance=MaintenanceConfig(scrub_seconds=0.02, scrub_cpu_percent=100),
        )
    )


def test_a_server_looks_for_rot_by_itself_tells_it_and_counts(
    rotting: Callable[[], Service], caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        service, began = rotting(), time.time()
        await service.start(listen=False)
        while (finished_at := service.status().pools[0].scrub.finished_at) is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        assert finished_at >= began, "by the clock of the day"
        found = service.status().pools[0].scrub
        assert (found.rotten_objects, found.rotten_blocks) == (1, 1)
        assert found.objects >= 1
        assert found.blocks >= 1
        assert any(run.kind == "scrub" and run.reason == "interval" for run in await service.runs())
        with pytest.raises(UserError, match="block 0 of export 'disk'"):
            await service.run("check", RunOptions(), pool=None, cpu_percent=100, progress=nothing)
        await service.stop()

    play(story)
    assert "1 block that is not what was written: block 0 of export 'disk'" in caplog.text


def nothing(*_: Any) -> None: ...


class Slow:
    """A run that takes its steps when the test says so, and tells how long it was made to rest."""

    def __init__(self) -> None:
        self.steps = 0
        self.done = self.total = 0
        self.more = threading.Event()

    def step(self, budget: int = 0) -> bool:  # noqa: ARG002 - as a Run has it
        self.steps += 1
        return not self.more.is_set()

    def report(self) -> CheckReport:
        return CheckReport(objects_checked=0, changing=0)


class Still:
    """A pool that nobody uses."""

    def stats(self) -> PoolStats:
        with Pool() as pool:
            return pool.stats()

    def turns(self) -> int:
        return 0


def test_a_scrub_hurries_while_another_run_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: set[int] = set()

    def note(percent: int, beside: bool) -> int:  # noqa: ARG001 - as the real one
        shares.add(percent)
        return 100

    monkeypatch.setattr("nbdzram.server.maintenance.share_percent", note)

    async def story() -> None:
        scrub, other = Slow(), Slow()
        other.more.set()
        maintenance = Maintenance("default", Still(), {"scrub": lambda _: scrub, "fold": lambda _: other})
        first = asyncio.create_task(maintenance.run("scrub", cpu_percent=5))
        while 5 not in shares:  # noqa: ASYNC110 - a condition of another thread
            await asyncio.sleep(0.001)
        assert shares == {5}
        second = asyncio.create_task(maintenance.run("fold", cpu_percent=25))
        while 100 not in shares:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        scrub.more.set()
        await asyncio.gather(first, second)
        await maintenance.stop()

    asyncio.run(story())


def test_what_scrubs_looked_at_is_counted_from_one_to_the_next() -> None:
    with Pool() as pool:
        pool.create("disk", MIB).write(0, half_random(1) + half_random(2) + b"same" * (BLOCK // 4))
        scrubs = Scrubs("default", pool, objects=10, blocks=20)
        for count in range(1, 4):
            run(scrubs.begin())
            told = scrubs.status()
            assert (told.objects, told.blocks) == (10 + 2 * count, 20 + MIB // BLOCK * count)


def test_scrubs_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.create("disk", MIB).write(0, half_random(1))
        bend(path, 1)
        scrubs = Scrubs("default", pool)
        scrub = scrubs.begin()
        scrubs.tell(1.0)
        assert scrubs.status().finished_at is None
        run(scrub)
        scrubs.tell(2.0)
        scrubs.tell(3.0)
        assert scrubs.status().finished_at == 2.0
    assert caplog.text.count("block 0 of export 'disk'") == 1
