"""One maintenance run, from when it is asked for until it has ended: where it stands, and how it is told to stop.

    WAITING ──> RUNNING <──> PAUSED
       │           │            │
       └───────────┴────────────┴──> DONE, FAILED, CANCELLED

The event loop owns the state. The thread that works learns of it through two events, `ended` and `going`, and looks at
them between two slices: whatever is asked of a run comes true within one.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from enum import StrEnum
from typing import Protocol

from nbdzram.engine.reports import Report
from nbdzram.errors import UserError
from nbdzram.status import RunOptions, RunStatus

FORECAST_SECONDS = 0.5
"""Work after which the time that is left is told; before, it would jump with every slice."""
STOPS, REPLACED, REMOVED = "the server stops", "another process takes over; ask that one again", "the pool is removed"
"""What ends runs, and the first two streams, that nobody told to end."""


class Run(Protocol):
    """One run of the engine in bounded steps; step() comes from one thread, the counters from any."""

    def step(self, budget: int = ...) -> bool:
        """Look at up to `budget` objects; True while there is more."""

    @property
    def done(self) -> int:
        """Work done, in the run's own measure."""

    @property
    def total(self) -> int:
        """Work to do, as far as is known."""

    def report(self) -> Report:
        """What came of it."""


class RunState(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


LIVE = frozenset({RunState.WAITING, RunState.RUNNING, RunState.PAUSED})
ENDS = frozenset(RunState) - LIVE
MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: ENDS - {RunState.DONE} | {RunState.RUNNING},
    RunState.RUNNING: ENDS | {RunState.PAUSED},
    RunState.PAUSED: ENDS | {RunState.RUNNING},  # its last slice may be the one in which it is told to pause
}


class Ticket:
    """One run in the queue of its pool."""

    def __init__(
        self, number: int, kind: str, pool: str, options: RunOptions, *, cpu_percent: int, reason: str
    ) -> None:
        self.number = number
        self.kind = kind
        self.options = options
        self.cpu_percent = cpu_percent
        self.reason = reason
        self.state = RunState.WAITING
        self.ended = threading.Event()  # its thread does no further slice
        self.going = threading.Event()  # cleared: its thread waits before the next slice
        self.going.set()
        self.report: Report | None = None
        self.error: str | None = None
        self._pool = pool
        self._run: Run | None = None
        self._progress = (0, 0)  # of the run that has ended: it is let go then, with all that it holds in the pool
        self._asked_at = time.time()
        self._started_at: float | None = None
        self._finished_at: float | None = None
        self._began: float | None = None  # the same by a clock that nobody sets
        self._ended: float | None = None
        self._working_since: float | None = None
        self._worked_seconds = 0.0  # without pauses
        self._rests_until = 0.0

    def __str__(self) -> str:
        """As sentences name it."""
        return f"run {self.number} ({self.kind} of the pool '{self._pool}')"

    @property
    def cancelled(self) -> bool:
        """Somebody ended it before its time."""
        return self.state is RunState.CANCELLED

    @property
    def progress(self) -> tuple[int, int]:
        """done and total, in the run's own measure."""
        return (self._run.done, self._run.total) if self._run else self._progress

    def start(self, run: Run) -> None:
        """It is its turn."""
        self._move(RunState.RUNNING)
        self._run, self._started_at, self._began = run, time.time(), time.monotonic()

    def pause(self) -> None:
        """Hold it before its next slice. Raises UserError."""
        if self.state is not RunState.RUNNING:
            raise UserError(f"{self} is {self.state}; only a running one can be paused")
        self._move(RunState.PAUSED)
        self.going.clear()

    def resume(self) -> None:
        """Let a paused one go on. Raises UserError."""
        if self.state is not RunState.PAUSED:
            raise UserError(f"{self} is {self.state}; only a paused one can be resumed")
        self._move(RunState.RUNNING)
        self.going.set()

    def rest(self, seconds: float) -> None:
        """On its thread: between two slices, unless it is ended meanwhile."""
        self._rests_until = time.monotonic() + seconds
        self.ended.wait(seconds)
        self._rests_until = 0.0

    def end(self, state: RunState, *, report: Report | None = None, error: str | None = None) -> None:
        """It came to its end, or is to end at its next slice."""
        self._progress = self.progress
        self._move(state)
        self._run, self._finished_at, self._ended = None, time.time(), time.monotonic()
        self.report, self.error = report, error
        self.ended.set()
        self.going.set()

    def status(self) -> RunStatus:
        """At this moment."""
        done, total = self.progress
        until = time.monotonic() if self._ended is None else self._ended
        return RunStatus(
            number=self.number,
            kind=self.kind,
            pool=self._pool,
            state=self.state.value,
            reason=self.reason,
            dry_run=self.options.dry_run,
            cpu_percent=self.cpu_percent,
            asked_at=self._asked_at,
            started_at=self._started_at,
            finished_at=self._finished_at,
            seconds=0.0 if self._began is None else until - self._began,
            done=done,
            total=total,
            seconds_left=self._seconds_left(done, total),
            result={} if self.report is None else asdict(self.report),
            error=self.error,
        )

    def _seconds_left(self, done: int, total: int) -> float | None:
        """As fast as it was so far, its rests included; at the least what is left of the rest that it takes."""
        worked, now = self._worked_seconds, time.monotonic()
        if self._working_since is not None:
            worked += now - self._working_since
        if self.state is not RunState.RUNNING or worked < FORECAST_SECONDS or not done:
            return None
        return max(worked * (total - done) / done, self._rests_until - now)

    def _move(self, state: RunState) -> None:
        assert state in MOVES.get(self.state, ()), (self.state, state)
        if self._working_since is not None:
            self._worked_seconds += time.monotonic() - self._working_since
        self._working_since = time.monotonic() if state is RunState.RUNNING else None
        self.state = state
