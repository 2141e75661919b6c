"""Runs go off the event loop, one at a time, paced, and end with the server."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdzram.engine.reports import FoldReport
from nbdzram.engine.stats import PoolStats
from nbdzram.errors import CheckFailed, RunCancelled, UserError
from nbdzram.server.maintenance import (
    FIRST_SLICE,
    LOOK_SECONDS,
    MAX_SLICE,
    MIN_SLICE,
    MOST_WAITING,
    SLICE_BESIDE_CLIENTS_SECONDS,
    SLICE_SECONDS,
    Company,
    Maintenance,
    next_budget,
    pause_seconds,
    share_percent,
)
from nbdzram.server.runs import ENDS, LIVE, MOVES, RunState, Ticket
from nbdzram.status import RunOptions, RunStatus, RunTotals
from tests.unit.records import POOL_STATS
from tests.unit.server.house import House, tell


class CountingPool:
    """A pool whose memory the test sets."""

    def __init__(self) -> None:
        self.used = POOL_STATS.mem_used_total
        self.others_turns = 0

    def stats(self) -> PoolStats:
        return replace(POOL_STATS, mem_used_total=self.used)

    def turns(self) -> int:
        return self.others_turns


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

    def report(self) -> FoldReport:
        return FoldReport(objects_merged=self.done, bytes_freed=0, pages_returned=1, comparisons=0)


def test_a_run_reports_before_after_and_what_came_of_it() -> None:
    """Clients store two pages while the run returns one: it freed one."""
    pool, heard = CountingPool(), []

    def step() -> None:
        pool.used += 2 * 4096 - 4096

    async def act() -> None:
        maintenance = Maintenance("default", pool, {"fold": lambda _: ScriptedRun(FIRST_SLICE, step)})
        report = await maintenance.run("fold", progress=lambda run, ahead: heard.append((run.done, run.total, ahead)))
        assert report.after.mem_used_total - report.before.mem_used_total == 4096
        fold = {"objects_merged": FIRST_SLICE, "bytes_freed": 0, "pages_returned": 1, "comparisons": 0}
        assert (report.result, report.reason) == (fold, "asked")
        assert heard[-1] == (FIRST_SLICE, FIRST_SLICE, None)
        (summary,) = maintenance.recent
        assert (summary.kind, summary.bytes_freed, summary.result) == ("fold", 4096, report.result)
        totals = maintenance.totals["fold"]
        assert (totals.runs, totals.failures, totals.bytes_freed) == (1, 0, 4096)
        await maintenance.stop()

    asyncio.run(act())


def test_steps_run_on_one_thread_of_their_own_at_everybodys_priority() -> None:
    """At a lower one it would keep the pool's lock from clients while somebody else has its processor."""
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
    assert priority == before


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
        monkeypatch.setattr("nbdzram.server.runs.threading", SimpleNamespace(Event=RecordingEvent))
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(200, burn)})
        await maintenance.run("fold", cpu_percent=100)
        assert pauses == []
        report = await maintenance.run("fold", cpu_percent=25)
        assert sum(pause or 0 for pause in pauses) == pytest.approx(3 * report.cpu_seconds, rel=0.5)
        pauses.clear()
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(FIRST_SLICE, burn)})
        await maintenance.run("fold", cpu_percent=1)
        assert pauses == [], "nobody waits for a rest behind the last slice"
        await maintenance.stop()

    def burn() -> None:
        sum(range(200_000))

    asyncio.run(act())
    assert pause_seconds(0.010, 25) == pytest.approx(0.030)


def test_a_run_rests_as_long_as_it_works_while_clients_come(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float | None] = []
    pool = CountingPool()

    class RecordingEvent(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return False

    def serve() -> None:
        pool.others_turns += 100
        sum(range(200_000))

    async def act() -> None:
        monkeypatch.setattr("nbdzram.server.runs.threading", SimpleNamespace(Event=RecordingEvent))
        maintenance = Maintenance("default", pool, {"fold": lambda _: ScriptedRun(200, serve)})
        report = await maintenance.run("fold", cpu_percent=100)
        assert sum(pause or 0 for pause in pauses) == pytest.approx(report.cpu_seconds, rel=0.5)
        await maintenance.stop()

    asyncio.run(act())
    assert [share_percent(80, beside) for beside in (False, True)] == [80, 50]
    assert share_percent(20, beside=True) == 20


def test_slices_are_short_while_clients_come_and_long_when_they_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = CountingPool()
    told: list[float] = []
    wanted = [SLICE_SECONDS, SLICE_BESIDE_CLIENTS_SECONDS, SLICE_SECONDS]
    steps = itertools.count()

    def note(budget: int, elapsed_seconds: float, slice_seconds: float) -> int:  # noqa: ARG001 - as the real one
        if not told or told[-1] != slice_seconds:
            told.append(slice_seconds)
        return budget

    def serve() -> None:
        if SLICE_BESIDE_CLIENTS_SECONDS not in told:
            pool.others_turns += 100
        if told == wanted or next(steps) == 100_000:
            run.total = 0

    monkeypatch.setattr("nbdzram.server.maintenance.next_budget", note)

    async def act() -> None:
        maintenance = Maintenance("default", pool, {"fold": lambda _: run})
        await maintenance.run("fold")
        await maintenance.stop()

    run = ScriptedRun(1 << 60, serve)
    asyncio.run(act())
    assert told == wanted


def test_whoever_comes_to_a_pool_is_seen_and_whoever_asks_for_counters_is_not() -> None:
    pool = CountingPool()
    pool.others_turns = 7
    company = Company(100.0, pool.turns)
    looks = [
        (0.5, 1000, False),  # too soon to tell
        (1.0, 1000, True),
        (1.5, 1000, True),  # a slice is over before anybody can have come again
        (2.0, 1004, False),
        (3.0, 1009, True),
        (4.5, 1009, False),
    ]
    for late, turns, beside in looks:
        pool.others_turns = turns
        assert company.look(100.0 + late * LOOK_SECONDS * 1.0001) is beside, late


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
        assert [run.error for run in maintenance.runs] == ["the server stops"]

    asyncio.run(act())


def test_a_run_in_a_pool_that_is_removed_ends_and_says_so(tmp_path: Path) -> None:
    house, stepped = House(tmp_path), threading.Event()

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_pool("fast", 0, "fold")
            house.service._pools["fast"].maintenance._kinds = {"fold": lambda _: ScriptedRun(1 << 60, stepped.set)}
            asked = asyncio.create_task(
                house.service.run("fold", RunOptions(), pool="fast", cpu_percent=1, progress=lambda *_: None)
            )
            await asyncio.to_thread(stepped.wait)
            await changes.remove_pool("fast")
            with pytest.raises(UserError, match="fold of the pool 'fast' did not finish: the pool is removed"):
                await asked

    tell(story())


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
    assert next_budget(1000, 0.01, 0.01) == 1000
    assert next_budget(1000, 0.03, 0.01) == 500
    assert next_budget(1000, 0.0025, 0.01) == 2000
    assert next_budget(MIN_SLICE, 1.0, 0.01) == MIN_SLICE
    assert next_budget(MAX_SLICE, 0.0, 0.01) == MAX_SLICE


def test_no_slice_of_the_dearest_run_keeps_a_write_that_found_no_room_waiting_for_long() -> None:
    """Such a write compacts between two steps; to recompress an object takes 0.4 ms at the highest level."""
    dearest_object_seconds = 0.0004
    budget = FIRST_SLICE
    for _ in range(20):
        assert budget * dearest_object_seconds <= 3 * SLICE_SECONDS
        budget = next_budget(budget, budget * dearest_object_seconds, SLICE_SECONDS)


class Gate:
    """A run's step that begins, and waits until it may go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        self.begun.set()
        assert self.open.wait(60)  # a test that fails before it opens the gate ends all the same


def gated(total: int = 1 << 40) -> tuple[Maintenance, Gate]:
    """A pool whose run `long` stands at the gate, and whose run `fold` is done in one step."""
    gate = Gate()
    kinds = {"long": lambda _: ScriptedRun(total, gate), "fold": lambda _: ScriptedRun(1, CountingPool)}
    return Maintenance("default", CountingPool(), kinds), gate


async def waiting(maintenance: Maintenance, number: int) -> Ticket:
    """The run of that number, once it stands in the queue."""
    while (ticket := maintenance.find(number)) is None:  # noqa: ASYNC110 - it takes its place within the next turns
        await asyncio.sleep(0)
    return ticket


def test_so_many_runs_wait_and_no_more() -> None:
    """Who asks and hangs up leaves his run in the queue."""

    async def act() -> None:
        maintenance, gate = gated(total=1)
        asked = [asyncio.create_task(maintenance.run("long"))]
        await asyncio.to_thread(gate.begun.wait)
        for _ in range(MOST_WAITING + 3):  # at once
            asked.append(asyncio.create_task(maintenance.run("fold")))
        refused, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert refused == set(asked[-3:])
        with pytest.raises(UserError, match=f"^{MOST_WAITING} runs wait for their turn in the pool 'default' already"):
            await maintenance.run("fold")
        gate.open.set()
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(one, UserError) for one in ended] == [False] * (1 + MOST_WAITING) + [True] * 3
        await maintenance.run("fold")
        await maintenance.stop()

    asyncio.run(act())


def test_a_run_that_waits_says_for_which_and_how_far_that_is() -> None:
    async def act() -> None:
        maintenance, gate = gated(total=1)
        told: list[tuple[RunStatus, RunStatus | None]] = []
        heard = asyncio.Event()

        def hear(run: RunStatus, waits_for: RunStatus | None) -> None:
            told.append((run, waits_for))
            heard.set()

        first = asyncio.create_task(maintenance.run("long"))
        await asyncio.to_thread(gate.begun.wait)
        second = asyncio.create_task(maintenance.run("fold", progress=hear))
        await heard.wait()
        (run, ahead), *_ = told
        assert ahead is not None
        assert (run.number, run.kind, run.state) == (2, "fold", "waiting")
        assert (ahead.number, ahead.kind, ahead.state, ahead.done, ahead.total) == (1, "long", "running", 0, 1)
        assert [(one.number, one.state) for one in maintenance.queue] == [(1, "running"), (2, "waiting")]
        gate.open.set()
        await asyncio.gather(first, second)
        assert told[-1][1] is None
        assert maintenance.queue == ()
        assert [(one.number, one.state) for one in maintenance.runs] == [(1, "done"), (2, "done")]
        await maintenance.stop()

    asyncio.run(act())


def test_a_cancelled_run_ends_at_its_next_slice_and_the_next_one_begins() -> None:
    async def act() -> None:
        maintenance, gate = gated()
        first = asyncio.create_task(maintenance.run("long"))
        await asyncio.to_thread(gate.begun.wait)
        second = asyncio.create_task(maintenance.run("fold"))
        await waiting(maintenance, 2)
        ticket = await waiting(maintenance, 1)
        assert (await maintenance.cancel(ticket)).state == "cancelled"
        assert maintenance.find(1) is None  # it is not there to be cancelled twice
        gate.open.set()
        with pytest.raises(
            RunCancelled, match=r"run 1 \(long of the pool 'default'\) was cancelled; what it did .* stays"
        ):
            await first
        assert (await second).kind == "fold"
        assert gate.steps == 1
        cancelled, _ = maintenance.runs
        assert [(run.kind, run.state) for run in maintenance.recent] == [("long", "cancelled"), ("fold", "done")]
        assert maintenance.recent[0].result == cancelled.result
        assert (cancelled.state, cancelled.result["objects_merged"] > 0) == ("cancelled", True)
        assert maintenance.totals["long"] == RunTotals()  # neither an end nor a failure
        await maintenance.stop()

    asyncio.run(act())


def test_a_run_can_be_cancelled_while_it_waits_and_never_begins() -> None:
    async def act() -> None:
        maintenance, gate = gated(total=1)
        first = asyncio.create_task(maintenance.run("long"))
        await asyncio.to_thread(gate.begun.wait)
        second = asyncio.create_task(maintenance.run("long"))
        ticket = await waiting(maintenance, 2)
        await maintenance.cancel(ticket)
        with pytest.raises(RunCancelled):
            await second  # while the first still stands at the gate
        gate.open.set()
        await first
        assert gate.steps == 1
        assert len(maintenance.recent) == 1  # what never began changed nothing
        await maintenance.stop()

    asyncio.run(act())


def test_a_paused_run_does_no_slice_until_it_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            held.set()
            return super().wait(timeout)

    async def act() -> None:
        monkeypatch.setattr("nbdzram.server.runs.threading", SimpleNamespace(Event=Watched))
        maintenance, gate = gated(total=FIRST_SLICE + 1)
        first = asyncio.create_task(maintenance.run("long"))
        await asyncio.to_thread(gate.begun.wait)
        ticket = maintenance.find(1)
        assert ticket is not None
        with pytest.raises(UserError, match="is running; only a paused one can be resumed"):
            ticket.resume()
        ticket.pause()
        assert ticket.status().seconds_left is None
        with pytest.raises(UserError, match="is paused; only a running one can be paused"):
            ticket.pause()
        gate.open.set()
        await asyncio.to_thread(held.wait)
        assert (gate.steps, maintenance.queue[0].state) == (1, "paused")
        ticket.resume()
        await first
        assert gate.steps == 2
        await maintenance.stop()

    asyncio.run(act())


def test_a_server_that_stops_does_not_wait_for_a_paused_run() -> None:
    async def act() -> None:
        maintenance, gate = gated()
        first = asyncio.create_task(maintenance.run("long"))
        await asyncio.to_thread(gate.begun.wait)
        ticket = maintenance.find(1)
        assert ticket is not None
        ticket.pause()
        gate.open.set()
        await maintenance.stop()
        with pytest.raises(UserError, match="the server stops"):
            await first

    asyncio.run(act())


def test_a_failed_run_says_why_in_the_list() -> None:
    def fail() -> None:
        raise CheckFailed("object 7 does not match")

    async def act() -> None:
        maintenance = Maintenance("fast", CountingPool(), {"check": lambda _: ScriptedRun(1, fail)})
        with pytest.raises(UserError):
            await maintenance.run("check")
        (run,) = maintenance.runs
        assert (run.state, "object 7 does not match" in str(run.error)) == ("failed", True)
        assert [summary.state for summary in maintenance.recent] == ["failed"]
        await maintenance.stop()

    asyncio.run(act())


@pytest.mark.parametrize("end", sorted(ENDS))
def test_a_run_that_has_ended_stays_so(end: RunState) -> None:
    assert end not in MOVES
    ticket = Ticket(1, "fold", "default", RunOptions(), cpu_percent=100, reason="asked")
    run = ScriptedRun(10, CountingPool)
    ticket.start(run)
    run.done = 3
    ticket.end(end)
    assert (ticket.ended.is_set(), ticket.progress) == (True, (3, 10))
    for state in LIVE:
        with pytest.raises(AssertionError):
            ticket.end(state)


def test_time_left_goes_by_the_work_done_and_not_by_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("nbdzram.server.runs.time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))
    run = ScriptedRun(100, CountingPool)
    ticket = Ticket(1, "fold", "default", RunOptions(), cpu_percent=100, reason="asked")
    ticket.start(run)
    run.done, now = 25, now + 10
    assert ticket.status().seconds_left == 30
    for done, left in ((50, 20), (75, 10)):
        ticket.pause()
        now += 1000
        ticket.resume()
        run.done, now = done, now + 10
        assert ticket.status().seconds_left == left
    assert ticket.status().seconds == 2030


def test_a_clock_that_is_set_meanwhile_makes_a_run_neither_longer_nor_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, now = 1000.0, 100.0
    monkeypatch.setattr("nbdzram.server.runs.time", SimpleNamespace(time=lambda: wall, monotonic=lambda: now))
    ticket = Ticket(1, "fold", "default", RunOptions(), cpu_percent=100, reason="asked")
    assert ticket.status().seconds == 0
    ticket.start(ScriptedRun(100, CountingPool))
    wall, now = wall - 3600, now + 10
    assert ticket.status().seconds == 10
    ticket.end(RunState.DONE)
    now += 5
    assert ticket.status().seconds == 10


def test_a_run_that_rests_has_no_less_left_than_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a second at two per cent rests for most of a minute, with nearly all of the work done."""
    now, told = 0.0, []

    class Rest(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
            nonlocal now
            for _ in range(2):
                now += 20
                told.append(ticket.status().seconds_left)
            return False

    monkeypatch.setattr("nbdzram.server.runs.time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    monkeypatch.setattr("nbdzram.server.runs.threading", SimpleNamespace(Event=Rest))
    run = ScriptedRun(100, lambda: None)
    ticket = Ticket(1, "fold", "default", RunOptions(), cpu_percent=2, reason="asked")
    ticket.start(run)
    run.done, now = 99, 1.0
    ticket.rest(49)
    assert told == [pytest.approx(29), pytest.approx(9)]
    assert ticket.status().seconds_left == pytest.approx(41 / 99)


def test_a_dry_run_frees_nothing_and_is_not_among_the_last_runs() -> None:
    """Its result says what it would return; the pool has it still."""

    async def act() -> None:
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(1, CountingPool)})
        report = await maintenance.run("fold", RunOptions(dry_run=True))
        assert (report.dry_run, report.result["pages_returned"]) == (True, 1)
        assert (maintenance.totals["fold"].runs, maintenance.totals["fold"].bytes_freed) == (1, 0)
        assert not maintenance.recent
        await maintenance.stop()

    asyncio.run(act())
