"""Runs that improve a pool, off the event loop: fold, compact, recompress, check.

One run at a time a pool, on a thread of the pool's own; the others wait in a queue, and say for whom. A run goes in
slices; between two slices the thread sleeps as the processor budget asks, and looks whether the run was paused or
ended. The event loop only polls the run's counters, for progress.

The thread has the priority of every other: one of a lower keeps the pool's lock while whoever is more important uses
the processor, and a client waits for both. So it is the budget that gives way: while clients come to the pool, a run
works for a tenth of a millisecond and rests as long.

    event loop   run() ── queue ── thread ── poll every PROGRESS_SECONDS ── report
    thread                 step step pause step step pause ... report

A paused run keeps its turn: a compaction that is held half-way has zspages in hand, and two recompressions would try
the same objects twice. Whoever waits for it is told so, and may cancel it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Protocol

from nbdzram.engine.reports import MemoryReport, Report
from nbdzram.engine.stats import PoolStats
from nbdzram.errors import EngineError, RunCancelled, UserError
from nbdzram.server.policy import gained
from nbdzram.server.runs import LIVE, STOPS, Run, RunState, Ticket
from nbdzram.status import RunOptions, RunReport, RunStatus, RunSummary, RunTotals

PROGRESS_SECONDS = 0.1  # smooth to the eye, cheap to send
SLICE_SECONDS = 0.001
SLICE_BESIDE_CLIENTS_SECONDS = 0.0001  # without a pause: who wakes up on the run's processor may have to wait so long
BESIDE_CLIENTS_PERCENT = 50  # of one core at most while clients come: every slice is followed by as long a rest
LOOK_SECONDS = 0.002
FEW_TURNS = 4  # of others in the pool from look to look: who only asks for counters is no client
FIRST_SLICE = 4  # objects; then the budget follows the time a slice takes
MOST_WAITING = 64
"""Runs of a pool: who asks and goes away leaves his in the queue, and each is told of by every status."""
RECENT_RUNS = 20  # what a page shows, and `nbdzram runs` of those that have ended
MIN_SLICE, MAX_SLICE = 1, 1 << 16
"""Objects: to recompress one takes 0.4 ms at level 19, and a write that found no room waits for the end of a slice
before it may compact."""


class Counted(Protocol):
    """A pool, as far as a report needs it."""

    def stats(self) -> PoolStats:
        """Its counters now."""

    def turns(self) -> int:
        """How often others than runs have had its lock, or did without."""


Progress = Callable[[RunStatus, RunStatus | None], None]
"""Told of a run, and of the one under way while it waits for that."""

RunFactory = Callable[[RunOptions], Run]
"""Starts a run. Raises UserError where what is asked for makes no sense."""

DEFAULTS = RunOptions()


class Maintenance:
    """The maintenance runs of one pool. `numbers` is what a server's pools number their runs from."""

    def __init__(
        self, name: str, pool: Counted, kinds: Mapping[str, RunFactory], numbers: Iterator[int] | None = None
    ) -> None:
        self.name = name
        self.totals: dict[str, RunTotals] = {kind: RunTotals() for kind in kinds}
        self.recent: deque[RunSummary] = deque(maxlen=RECENT_RUNS)
        self._pool = pool
        self._kinds = kinds
        self._numbers = numbers or itertools.count(1)
        self._queue: list[Ticket] = []  # the first one is under way
        self._ended: deque[RunStatus] = deque(maxlen=RECENT_RUNS)
        self._turn = asyncio.Condition()  # notified when the queue gets shorter, or somebody in it was told to end
        self._ends_as = ""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"maintain-{name}")

    @property
    def running(self) -> str | None:
        """The kind of the run under way."""
        return self._queue[0].kind if self._queue else None

    @property
    def queue(self) -> tuple[RunStatus, ...]:
        """The run under way and those that wait for it, in their order."""
        return tuple(ticket.status() for ticket in self._queue)

    @property
    def runs(self) -> tuple[RunStatus, ...]:
        """All that are remembered, by their numbers: the last that ended, and the queue."""
        return tuple(sorted((*self._ended, *self.queue), key=lambda run: run.number))

    def progress(self) -> tuple[int, int]:
        """done and total of the run under way, or zeroes."""
        return self._queue[0].progress if self._queue else (0, 0)

    def find(self, number: int) -> Ticket | None:
        """The run of that number, if it waits or is under way."""
        return next((one for one in self._queue if one.number == number and one.state in LIVE), None)

    async def run(
        self,
        kind: str,
        options: RunOptions = DEFAULTS,
        *,
        cpu_percent: int = 100,
        reason: str = "asked",
        progress: Progress | None = None,
    ) -> RunReport:
        """One run from start to end, after those that are already waiting. Raises UserError, RunCancelled.

        A caller that goes away does not end the run.
        """
        _, told = await self._shielded(kind, options, cpu_percent, reason, progress)
        return told

    async def gain(self, kind: str, options: RunOptions, *, cpu_percent: int, reason: str) -> int:
        """The same, for who wants to know how many bytes it freed, and no more."""
        report, _ = await self._shielded(kind, options, cpu_percent, reason, None)
        return gained(report)

    async def _shielded(
        self, kind: str, options: RunOptions, cpu_percent: int, reason: str, progress: Progress | None
    ) -> tuple[Report, RunReport]:
        if kind not in self._kinds:
            raise UserError(f"there is no run '{kind}'; there are {', '.join(self._kinds)}")
        if len(self._queue) > MOST_WAITING:  # the first one is under way
            raise UserError(
                f"{MOST_WAITING} runs wait for their turn in the pool '{self.name}' already; ask again later, or end "
                "some: `nbdzram runs` shows them"
            )
        ticket = Ticket(next(self._numbers), kind, self.name, options, cpu_percent=cpu_percent, reason=reason)
        self._refuse_when_ended(ticket)
        self._queue.append(ticket)  # before anybody else asks
        return await asyncio.shield(asyncio.create_task(self._run_in_turn(ticket, progress)))

    async def cancel(self, ticket: Ticket) -> RunStatus:
        """End a run at its next slice, or before it began. What it did until then stays."""
        ticket.end(RunState.CANCELLED)
        async with self._turn:
            self._turn.notify_all()
        return ticket.status()

    async def stop(self, why: str = STOPS) -> None:
        """End the run under way at its next slice; refuse new ones. `why`: whoever asked for one is told."""
        self._ends_as = self._ends_as or why
        for ticket in tuple(self._queue):
            if ticket.state in LIVE:
                ticket.end(RunState.CANCELLED, error=self._ends_as)
        async with self._turn:
            self._turn.notify_all()
            await self._turn.wait_for(lambda: not self._queue)
        self._executor.shutdown()

    async def _run_in_turn(self, ticket: Ticket, progress: Progress | None) -> tuple[Report, RunReport]:
        try:
            if progress is not None:  # at once: who asked can name it from now on
                ahead = self._queue[0]
                progress(ticket.status(), None if ahead is ticket else ahead.status())
            await self._wait_for_turn(ticket, progress)
            self._refuse_when_ended(ticket)
            return await self._perform(ticket, progress)
        except BaseException as error:
            if ticket.state in LIVE:
                ticket.end(RunState.FAILED, error=str(error))
            raise
        finally:
            self._queue.remove(ticket)
            self._remember(ticket)
            async with self._turn:
                self._turn.notify_all()

    async def _wait_for_turn(self, ticket: Ticket, progress: Progress | None) -> None:
        while self._queue[0] is not ticket and ticket.state is RunState.WAITING:
            if progress is not None:
                progress(ticket.status(), self._queue[0].status())
            async with self._turn:
                with contextlib.suppress(TimeoutError):  # to tell again how far the one before is
                    await asyncio.wait_for(self._turn.wait(), PROGRESS_SECONDS)

    async def _perform(self, ticket: Ticket, progress: Progress | None) -> tuple[Report, RunReport]:
        kind, options = ticket.kind, ticket.options
        before, started = self._pool.stats(), time.monotonic()
        run = self._kinds[kind](options)
        ticket.start(run)
        try:
            cpu_seconds = await self._watch(ticket, run, progress)
        except EngineError as error:
            self._count(kind, RunTotals(failures=1))
            raise UserError(f"{kind} of the pool '{self.name}' failed: {error}") from error
        seconds, after = time.monotonic() - started, self._pool.stats()
        report = run.report()
        if ticket.cancelled:
            ticket.report = report
        self._refuse_when_ended(ticket)
        ticket.end(RunState.DONE, report=report)
        self._count(kind, RunTotals(runs=1, seconds=seconds, cpu_seconds=cpu_seconds, bytes_freed=_freed(ticket)))
        result = asdict(report)
        told = RunReport(kind, self.name, options.dry_run, ticket.reason, seconds, cpu_seconds, result, before, after)
        return report, told

    async def _watch(self, ticket: Ticket, run: Run, progress: Progress | None) -> float:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._executor, self._work, run, ticket)
        finished: set[asyncio.Future[float]] = set()
        while not finished:
            finished, _ = await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
            if progress is not None and ticket.state in LIVE:  # at the end too, however fast it came
                progress(ticket.status(), None)
        return work.result()

    def _work(self, run: Run, ticket: Ticket) -> float:
        """On the thread: every slice. Gives the processor seconds."""
        budget, began = FIRST_SLICE, time.thread_time()
        more, company = True, Company(time.monotonic(), self._pool.turns)
        while more and not ticket.ended.is_set():
            wall, cpu = time.monotonic(), time.thread_time()
            more = run.step(budget)
            used = time.thread_time() - cpu
            now = time.monotonic()
            beside = company.look(now)
            budget = next_budget(budget, now - wall, SLICE_BESIDE_CLIENTS_SECONDS if beside else SLICE_SECONDS)
            percent = share_percent(100 if self._is_in_the_way(ticket) else ticket.cpu_percent, beside)
            if percent < 100 and more:  # what is done is told at once: a slice of level 19 rests for seconds
                ticket.rest(pause_seconds(used, percent))
            if not ticket.going.is_set():
                ticket.going.wait()
        return time.thread_time() - began

    def _is_in_the_way(self, ticket: Ticket) -> bool:
        """A scrub at its slow pace, and another run waits for its end."""
        return ticket.kind == "scrub" and len(self._queue) > 1

    def _refuse_when_ended(self, ticket: Ticket) -> None:
        if self._ends_as:
            raise UserError(f"{ticket.kind} of the pool '{self.name}' did not finish: {self._ends_as}")
        if ticket.cancelled:
            raise RunCancelled(f"{ticket} was cancelled; what it did until then stays")

    def _remember(self, ticket: Ticket) -> None:
        """One that has ended, however it did; a dry one and one that never began changed nothing to look back at."""
        ended = ticket.status()
        self._ended.append(ended)
        if ended.started_at is not None and ended.finished_at is not None and not ended.dry_run:
            self.recent.append(
                RunSummary(
                    kind=ended.kind,
                    state=ended.state,
                    reason=ended.reason,
                    finished_at=ended.finished_at,
                    seconds=ended.seconds,
                    bytes_freed=_freed(ticket),
                    result=ended.result,
                )
            )

    def _count(self, kind: str, outcome: RunTotals) -> None:
        self.totals[kind] = self.totals[kind].plus(outcome)


def _freed(ticket: Ticket) -> int:
    """The pages that it returned, whatever clients stored meanwhile."""
    report = ticket.report
    return report.bytes_returned if isinstance(report, MemoryReport) and not ticket.options.dry_run else 0


class Company:
    """Whether clients come to the pool beside a run."""

    def __init__(self, now: float, turns: Callable[[], int]) -> None:
        """`now`: seconds of time.monotonic; `turns`: of others, ever (Counted.turns), which every thread counts: asked
        for as seldom as it must be."""
        self._ask = turns
        self._looked_at, self._turns = now, turns()
        self._beside = False

    def look(self, now: float) -> bool:
        """What came since the last look tells; one in a hurry sees what that saw."""
        if now - self._looked_at >= LOOK_SECONDS:
            before, self._turns = self._turns, self._ask()
            self._beside = self._turns - before > FEW_TURNS
            self._looked_at = now
        return self._beside


def next_budget(budget: int, elapsed_seconds: float, slice_seconds: float) -> int:
    """The objects of the next slice, so that it takes about slice_seconds; at most halved or doubled at once."""
    if elapsed_seconds > 2 * slice_seconds:
        return max(budget // 2, MIN_SLICE)
    if elapsed_seconds < slice_seconds / 2:
        return min(budget * 2, MAX_SLICE)
    return budget


def share_percent(cpu_percent: int, beside: bool) -> int:
    """The share of a core for the next slice."""
    return min(cpu_percent, BESIDE_CLIENTS_PERCENT) if beside else cpu_percent


def pause_seconds(used_seconds: float, cpu_percent: int) -> float:
    """How long to sleep after `used_seconds` of processor time, so that it is cpu_percent of one core's time."""
    return used_seconds * (100 / cpu_percent - 1)
