"""Of what was done in pools, is being done, and waits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nbdzram.engine.stats import PoolStats
from nbdzram.status.pools import PoolFigures
from nbdzram.status.runs import RunStatus


@dataclass(frozen=True, slots=True)
class RunTotals:
    """All runs of one kind (fold, compact, ...) on one pool since the server started."""

    runs: int = 0
    failures: int = 0
    seconds: float = 0.0  # wall time
    cpu_seconds: float = 0.0
    bytes_freed: int = 0  # the pages that they returned, whatever clients stored meanwhile

    def plus(self, other: RunTotals) -> RunTotals:
        """The sum, field by field."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return RunTotals(*(a + b for a, b in zip(mine, others, strict=True)))


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run that has ended, in short."""

    kind: str
    state: str  # done, failed or cancelled
    reason: str  # asked, or the policy's
    finished_at: float  # seconds since the epoch
    seconds: float
    bytes_freed: int  # the pages that it returned, whatever clients stored meanwhile
    result: dict[str, int]  # the engine's report()


@dataclass(frozen=True, slots=True)
class MaintenanceStatus:
    """What a pool's maintenance is doing, did, and why."""

    running: str | None  # the kind of the run under way
    done: int
    total: int
    totals: dict[str, RunTotals]  # by kind
    decisions: dict[str, dict[str, int]]  # kind -> reason -> how often the policy started or declined a run
    next_allowed_seconds: dict[str, float]  # kind -> for how long the policy still backs off
    recent: tuple[RunSummary, ...]  # the last runs, the oldest first; dry runs and those that never began are left out
    queue: tuple[RunStatus, ...]  # the run under way, and those that wait for it, in their order


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """Looking for rot, by itself and in checks."""

    objects: int  # decoded since the start
    blocks: int  # looked at since the start
    rotten_objects: int  # that the last one found which was finished
    rotten_blocks: int
    finished_at: float | None  # in seconds since the epoch; None: none was finished yet


@dataclass(frozen=True, slots=True)
class PoolStatus(PoolFigures):
    """One pool, with what is done in it."""

    scrub: ScrubStatus
    maintenance: MaintenanceStatus


@dataclass(frozen=True, slots=True)
class RunReport:
    """One maintenance run that came to its end."""

    kind: str
    pool: str
    dry_run: bool
    reason: str  # asked, or the policy's
    seconds: float
    cpu_seconds: float
    result: dict[str, int]  # the engine's report()
    before: PoolStats
    after: PoolStats
