"""Of maintenance runs: asked for, waiting, under way, ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run goes. All but dry_run are recompression's (engine/recompress)."""

    dry_run: bool = False
    level: int = 3  # Zstandard's
    idle_seconds: int = 0  # only blocks that nobody used for so long
    huge_only: bool = False
    dictionary: bool = False


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One maintenance run: waiting, under way, or ended."""

    number: int  # counted from 1 since the server started
    kind: str
    pool: str
    state: str  # waiting, running, paused, done, failed or cancelled
    reason: str  # asked, or the policy's
    dry_run: bool
    cpu_percent: int  # share of one core that it may use
    asked_at: float  # seconds since the epoch
    started_at: float | None
    finished_at: float | None
    seconds: float  # since it started, pauses included
    done: int  # of total, in the run's own measure of work
    total: int
    seconds_left: float | None  # as fast as it was so far; null while that cannot be told
    result: dict[str, int]  # the engine's report(), of one that has ended
    error: str | None  # why it failed
