"""When a pool maintains itself: decisions without clocks, threads or I/O.

Each kind of run has a trigger. OFF never starts. INTERVAL starts when the interval has passed. AUTO weighs what a run
would gain against what it costs clients; the first that holds decides:

    gain < LEAST_BYTES                   not yet            nothing_new
    the last runs gained little          wait, doubling     backing_off
    near the memory limit                at once            near_limit
    gain < what is worth it              not yet            not_worth_it
    clients are busy                     wait, unless the gain is large    clients_busy
    otherwise                            now                worth_it

Every decision has a reason from the fixed set Reason and is counted, so that metrics can tell why nothing happens.
Whoever reads them learns when there is something to gain: so that is no single block that is equal to another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from nbdzram.config import Trigger
from nbdzram.engine.reports import MemoryReport, Report
from nbdzram.engine.stats import PAGE_SIZE, PoolStats

LEAST_BYTES = 16 * PAGE_SIZE  # the step in which strangers are told of memory (metrics/coarse.py)
WORTH_SHARE = 0.01  # of the stored bytes: less is lost in the noise of a busy pool
WORTH_BYTES = 1 << 20  # and less than this is not worth waking up for
LARGE_GAIN = 5  # times what is worth it: then clients have to share the processor
NEAR_LIMIT = 0.9  # of mem_limit: from here on every page counts
BUSY_REQUESTS = 200  # requests a second that count as busy: an idle file system makes a few
FIRST_BACKOFF_SECONDS = 30.0
LAST_BACKOFF_SECONDS = 3600.0
POOR_RESULT = 0.25  # of the expected gain: less, and the estimate was wrong


class Reason(StrEnum):
    """Why a run starts or does not."""

    INTERVAL = "interval"
    WORTH_IT = "worth_it"
    NEAR_LIMIT = "near_limit"
    NOT_DUE = "not_due"
    NOTHING_NEW = "nothing_new"
    NOT_WORTH_IT = "not_worth_it"
    CLIENTS_BUSY = "clients_busy"
    BACKING_OFF = "backing_off"


STARTS = frozenset({Reason.INTERVAL, Reason.WORTH_IT, Reason.NEAR_LIMIT})


def fold_gain(stats: PoolStats) -> int:
    """Bytes that a fold is expected to free: objects with a twin, at the mean length."""
    return stats.fold_pending * stats.compr_data_size // max(stats.objects, 1)


def compact_gain(stats: PoolStats) -> int:
    """Bytes that compaction is expected to free: what zspages hold beyond objects, less the rounding of lengths.

    A slot is on average half a class step (8 bytes) longer than its object.
    """
    return max(stats.mem_used_total - stats.compr_data_size - 8 * stats.objects, 0)


def recompress_gain(stats: PoolStats) -> int:
    """Bytes that recompression may free: Zstandard needs about a fifth less than LZ4 for a block of 4 KiB.

    What was tried and did not shrink is left out. It cannot know which blocks rest: a run that gains little makes the
    policy wait.
    """
    return stats.recompress_untried // 5


def gained(report: Report) -> int:
    """Bytes that a run of any kind freed, by its own count: a pool that clients fill meanwhile grows all the same."""
    return report.bytes_gained if isinstance(report, MemoryReport) else 0


@dataclass(slots=True)
class Policy:
    """The decisions about one kind of run on one pool. Seconds are a monotonic clock's."""

    trigger: Trigger
    interval_seconds: float
    expected_gain: Callable[[PoolStats], int]
    decisions: Counter[str]
    _last_run: float
    _backoff_seconds: float = 0.0

    @classmethod
    def new(
        cls, trigger: Trigger, interval_seconds: float, expected_gain: Callable[[PoolStats], int], now: float
    ) -> Policy:
        """A policy that has not run anything; the first interval starts now."""
        return cls(trigger, interval_seconds, expected_gain, Counter(), now)

    def decide(self, now: float, stats: PoolStats, requests_per_second: float) -> Reason | None:
        """Whether to start a run (a reason of STARTS) or why not; None when the trigger is off."""
        if self.trigger is Trigger.OFF:
            return None
        reason = (
            self._by_interval(now)
            if self.trigger is Trigger.INTERVAL
            else self._by_gain(now, stats, requests_per_second)
        )
        self.decisions[reason] += 1
        return reason

    def learn(self, now: float, expected: int, gained: int) -> None:
        """A run ended. Poor results make the next one wait, twice as long each time."""
        self._last_run = now
        if gained >= expected * POOR_RESULT:
            self._backoff_seconds = 0.0
        else:
            self._backoff_seconds = min(max(self._backoff_seconds * 2, FIRST_BACKOFF_SECONDS), LAST_BACKOFF_SECONDS)

    def waits_seconds(self, now: float) -> float:
        """For how long the policy still backs off, or the interval still runs."""
        pause = self.interval_seconds if self.trigger is Trigger.INTERVAL else self._backoff_seconds
        return max(self._last_run + pause - now, 0.0)

    def _by_interval(self, now: float) -> Reason:
        return Reason.INTERVAL if self.waits_seconds(now) == 0 else Reason.NOT_DUE

    def _by_gain(self, now: float, stats: PoolStats, requests_per_second: float) -> Reason:
        gain = self.expected_gain(stats)
        worth = max(int(stats.compr_data_size * WORTH_SHARE), WORTH_BYTES)
        if gain < LEAST_BYTES:
            return Reason.NOTHING_NEW
        if self.waits_seconds(now) > 0:
            return Reason.BACKING_OFF
        if stats.mem_limit and stats.memory_used >= NEAR_LIMIT * stats.mem_limit:
            return Reason.NEAR_LIMIT
        if gain < worth:
            return Reason.NOT_WORTH_IT
        if gain < LARGE_GAIN * worth and requests_per_second > BUSY_REQUESTS:
            return Reason.CLIENTS_BUSY
        return Reason.WORTH_IT
