"""Runs go off the event loop, one at a time, paced, and end with the server."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from nbdzram.engine.stats import PoolStats
from nbdzram.errors import CheckFailed, UserError
from nbdzram.server.maintenance import MAX_SLICE, MIN_SLICE, SLICE_SECONDS, Maintenance, next_budget, pause_seconds
from nbdzram.status import RunTotals
from tests.unit.records import POOL_STATS


class CountingPool:
    """A pool whose memory the test sets."""

    def __init__(self) -> None:
        self.used = POOL_STATS.mem_used_total

    def stats(self) -> PoolStats:
        return replace(POOL_STATS, mem_used_total=self.used)


class ScriptedRun:
    """A run of `total` objects that calls `on_step` on its thread at every step."""

    def __init__(self, total: int, on_step: Callable[[], object]) -> None:
        self.done = 0
        self.total = total
        self._on_step = on_step

    def step(self, budget: int = 4096) -> bool:
        self._on_step()
        self.done = min(self.done + budget, self.total)
        return self.done < self.total

    def report(self) -> dict[str, int]:
        return {"objects_merged": self.done, "pages_returned": 1}


def test_a_run_reports_before_after_and_what_came_of_it() -> None:
    """Clients store two pages while the run returns one: it freed one."""
    pool, heard = CountingPool(), []

    def step() -> None:
        pool.used += 2 * 4096 - 4096

    async def act() -> None:
        maintenance = Maintenance("default", pool, {"fold": lambda _: ScriptedRun(100, step)})
        report = await maintenance.run("fold", progress=lambda *step: heard.append(step))
        assert report.after.mem_used_total - report.before.mem_used_total == 4096
        assert (report.result, report.reason) == ({"objects_merged": 100, "pages_returned": 1}, "asked")
        assert heard[-1] == ("fold", "default", 100, 100)
        (summary,) = maintenance.recent
        assert (summary.kind, summary.bytes_freed, summary.result) == ("fold", 4096, report.result)
        totals = maintenance.totals["fold"]
        assert (totals.runs, totals.failures, totals.bytes_freed) == (1, 0, 4096)
        await maintenance.stop()

    asyncio.run(act())


def test_steps_run_on_one_thread_of_their_own_at_the_lowest_priority() -> None:
    seen: set[tuple[int, int]] = set()
    before = os.getpriority(
        os.PRIO_PROCESS, threading.get_native_id()
    )  # not 0 when the tests themselves run under nice

    def look() -> None:
        native = threading.get_native_id()
        seen.add((native, os.getpriority(os.PRIO_PROCESS, native)))

    async def act() -> None:
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(100_000, look)})
        await maintenance.run("fold")
        await maintenance.run("fold")
        await maintenance.stop()

    asyncio.run(act())
    ((thread, priority),) = seen
    assert thread != threading.get_native_id()
    assert priority == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_two_runs_of_a_pool_never_overlap() -> None:
    pool = CountingPool()

    def shrink() -> None:
        pool.used -= 4096

    async def act() -> None:
        maintenance = Maintenance("default", pool, {"fold": lambda _: ScriptedRun(3_000, shrink)})
        reports = await asyncio.gather(*(maintenance.run("fold") for _ in range(5)))
        assert maintenance.totals["fold"].runs == 5
        for earlier, later in pairwise(reports):
            assert later.before == earlier.after  # nobody else's work is in a report
        await maintenance.stop()

    asyncio.run(act())


def test_a_paced_run_sleeps_in_proportion_to_what_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float | None] = []

    class RecordingEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return False

    async def act() -> None:
        monkeypatch.setattr("nbdzram.server.maintenance.threading.Event", RecordingEvent)
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(2_000, burn)})
        monkeypatch.undo()
        await maintenance.run("fold", cpu_percent=100)
        assert pauses == []
        report = await maintenance.run("fold", cpu_percent=25)
        assert sum(pause or 0 for pause in pauses) == pytest.approx(3 * report.cpu_seconds, rel=0.5)
        await maintenance.stop()

    def burn() -> None:
        sum(range(200_000))

    asyncio.run(act())
    assert pause_seconds(0.010, 25) == pytest.approx(0.030)


def test_a_run_goes_on_when_whoever_asked_goes_away() -> None:
    began, may_go = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        may_go.wait()

    async def act() -> None:
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(1, wait)})
        asked = asyncio.create_task(maintenance.run("fold"))
        await asyncio.to_thread(began.wait)
        asked.cancel()
        may_go.set()
        await maintenance.run("fold")
        assert maintenance.totals["fold"].runs == 2
        await maintenance.stop()

    asyncio.run(act())


def test_stopping_ends_the_run_under_way_and_refuses_the_next() -> None:
    stepped = threading.Event()

    async def act() -> None:
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(1 << 60, stepped.set)})
        asked = asyncio.create_task(maintenance.run("fold", cpu_percent=1))
        await asyncio.to_thread(stepped.wait)
        await maintenance.stop()
        with pytest.raises(UserError, match="did not finish: the server stops"):
            await asked
        with pytest.raises(UserError, match="the server stops"):
            await maintenance.run("fold")

    asyncio.run(act())


def test_a_failing_run_is_a_refusal_that_names_pool_and_reason_and_is_counted() -> None:
    def fail() -> None:
        raise CheckFailed("object 7 does not match its fingerprint")

    async def act() -> None:
        maintenance = Maintenance("fast", CountingPool(), {"check": lambda _: ScriptedRun(1, fail)})
        with pytest.raises(UserError, match="check of the pool 'fast' failed: object 7"):
            await maintenance.run("check")
        assert maintenance.totals["check"] == RunTotals(failures=1)
        assert maintenance.running is None
        await maintenance.stop()

    asyncio.run(act())


def test_an_unknown_run_is_refused_with_those_there_are() -> None:
    async def act() -> None:
        maintenance = Maintenance("fast", CountingPool(), {"fold": lambda _: ScriptedRun(1, CountingPool)})
        with pytest.raises(UserError, match="there is no run 'squeeze'; there are fold"):
            await maintenance.run("squeeze")
        await maintenance.stop()

    asyncio.run(act())


def test_slices_follow_the_time_they_take_within_their_limits() -> None:
    assert next_budget(1000, SLICE_SECONDS) == 1000
    assert next_budget(1000, 3 * SLICE_SECONDS) == 500
    assert next_budget(1000, SLICE_SECONDS / 4) == 2000
    assert next_budget(MIN_SLICE, 1.0) == MIN_SLICE
    assert next_budget(MAX_SLICE, 0.0) == MAX_SLICE
