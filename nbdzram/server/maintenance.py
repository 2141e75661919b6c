"""Runs that improve a pool, off the event loop: fold, compact, recompress, check.

One run at a time a pool, on a thread of the pool's own at the lowest priority. A run goes in slices; between two
slices the thread sleeps as the processor budget asks, and looks whether the server stops. The event loop only polls
the run's counters, for progress.

    event loop   run() ── lock ── thread ── poll every PROGRESS_SECONDS ── report
    thread                step step pause step step pause ... report
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from nbdzram.engine.stats import PAGE_SIZE, PoolStats
from nbdzram.errors import EngineError, UserError
from nbdzram.status import RunOptions, RunReport, RunSummary, RunTotals

LOWEST_PRIORITY = 19
PROGRESS_SECONDS = 0.1  # smooth to the eye, cheap to send
SLICE_SECONDS = 0.005  # the interpreter lock and the pool's are given away at least so often
FIRST_SLICE = 256  # objects; then the budget follows the time a slice takes
RECENT_RUNS = 20  # what a page shows
MIN_SLICE, MAX_SLICE = 16, 1 << 16


class Run(Protocol):
    """One run of the engine in bounded steps; step() comes from one thread, the counters from any."""

    def step(self, budget: int = ...) -> bool:
        """Look at up to `budget` objects; True while there is more."""

    @property
    def done(self) -> int:
        """Objects looked at."""

    @property
    def total(self) -> int:
        """Objects to look at, as far as is known."""

    def report(self) -> dict[str, int]:
        """What came of it."""


class Counted(Protocol):
    """A pool, as far as a report needs it."""

    def stats(self) -> PoolStats:
        """Its counters now."""


Progress = Callable[[str, str, int, int], None]
RunFactory = Callable[[RunOptions], Run]
"""Starts a run. Raises UserError where what is asked for makes no sense."""

DEFAULTS = RunOptions()


class Maintenance:
    """The maintenance runs of one pool."""

    def __init__(self, name: str, pool: Counted, kinds: Mapping[str, RunFactory]) -> None:
        self.name = name
        self.totals: dict[str, RunTotals] = {kind: RunTotals() for kind in kinds}
        self.recent: deque[RunSummary] = deque(maxlen=RECENT_RUNS)
        self._pool = pool
        self._kinds = kinds
        self._lock = asyncio.Lock()
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"maintain-{name}", initializer=_lower_priority
        )
        self._running: tuple[str, Run] | None = None

    @property
    def running(self) -> str | None:
        """The kind of the run under way."""
        return self._running[0] if self._running else None

    def progress(self) -> tuple[int, int]:
        """done and total of the run under way, or zeroes."""
        return (self._running[1].done, self._running[1].total) if self._running else (0, 0)

    async def run(
        self,
        kind: str,
        options: RunOptions = DEFAULTS,
        *,
        cpu_percent: int = 100,
        reason: str = "asked",
        progress: Progress | None = None,
    ) -> RunReport:
        """One run from start to end, after those that are already waiting. Raises UserError.

        A caller that goes away does not end the run.
        """
        if kind not in self._kinds:
            raise UserError(f"there is no run '{kind}'; there are {', '.join(self._kinds)}")
        return await asyncio.shield(asyncio.create_task(self._run_alone(kind, options, cpu_percent, reason, progress)))

    async def stop(self) -> None:
        """End the run under way at its next slice; refuse new ones."""
        self._stopping.set()
        async with self._lock:
            self._executor.shutdown()

    async def _run_alone(
        self, kind: str, options: RunOptions, cpu_percent: int, reason: str, progress: Progress | None
    ) -> RunReport:
        async with self._lock:
            self._refuse_when_stopping(kind)
            before, started = self._pool.stats(), time.monotonic()
            run = self._kinds[kind](options)
            self._running = (kind, run)
            try:
                cpu_seconds = await self._watch(kind, run, cpu_percent, progress)
                self._refuse_when_stopping(kind)
            except EngineError as error:
                self._count(kind, RunTotals(failures=1))
                raise UserError(f"{kind} of the pool '{self.name}' failed: {error}") from error
            finally:
                self._running = None
            seconds, after = time.monotonic() - started, self._pool.stats()
            result = run.report()
            freed = 0 if options.dry_run else result.get("pages_returned", 0) * PAGE_SIZE
            self._count(kind, RunTotals(runs=1, seconds=seconds, cpu_seconds=cpu_seconds, bytes_freed=freed))
            if not options.dry_run:
                self.recent.append(RunSummary(kind, reason, time.time(), seconds, freed, result))
            return RunReport(kind, self.name, options.dry_run, reason, seconds, cpu_seconds, result, before, after)

    async def _watch(self, kind: str, run: Run, cpu_percent: int, progress: Progress | None) -> float:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._executor, self._work, run, cpu_percent)
        finished: set[asyncio.Future[float]] = set()
        while not finished:
            finished, _ = await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
            if progress is not None:  # at the end too, however fast it came
                progress(kind, self.name, run.done, run.total)
        return work.result()

    def _work(self, run: Run, cpu_percent: int) -> float:
        """On the thread: every slice. Gives the processor seconds."""
        budget, began = FIRST_SLICE, time.thread_time()
        more = True
        while more and not self._stopping.is_set():
            wall, cpu = time.monotonic(), time.thread_time()
            more = run.step(budget)
            used = time.thread_time() - cpu
            elapsed = time.monotonic() - wall
            budget = next_budget(budget, elapsed)
            if cpu_percent < 100:
                self._stopping.wait(pause_seconds(used, cpu_percent))
        return time.thread_time() - began

    def _refuse_when_stopping(self, kind: str) -> None:
        if self._stopping.is_set():
            raise UserError(f"{kind} of the pool '{self.name}' did not finish: the server stops")

    def _count(self, kind: str, outcome: RunTotals) -> None:
        self.totals[kind] = self.totals[kind].plus(outcome)


def next_budget(budget: int, elapsed_seconds: float) -> int:
    """The objects of the next slice, so that it takes about SLICE_SECONDS; at most halved or doubled at once."""
    if elapsed_seconds > 2 * SLICE_SECONDS:
        return max(budget // 2, MIN_SLICE)
    if elapsed_seconds < SLICE_SECONDS / 2:
        return min(budget * 2, MAX_SLICE)
    return budget


def pause_seconds(used_seconds: float, cpu_percent: int) -> float:
    """How long to sleep after `used_seconds` of processor time, so that it is cpu_percent of one core's time."""
    return used_seconds * (100 / cpu_percent - 1)


def _lower_priority() -> None:
    with contextlib.suppress(PermissionError):  # some sandboxes forbid even this; the processor budget remains
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
