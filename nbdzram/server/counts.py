"""Plain records of what exports and pools count, as they go from one process to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nbdzram.status import RunTotals

LATENCY_BOUNDS_SECONDS = tuple(2**k / 1e6 for k in range(23))
"""Upper bounds of OperationStatus.latency_counts; one more bucket holds the rest."""


class IoStat(NamedTuple):
    """zram's io_stat line (Documentation/admin-guide/blockdev/zram), in its order."""

    failed_reads: int
    failed_writes: int
    invalid_io: int
    notify_free: int  # blocks given back by TRIM


@dataclass(frozen=True, slots=True)
class OperationCount:
    """Requests of one kind to an export, as sessions/tally counts them."""

    requests: int
    size: int
    nanoseconds: int
    errors: tuple[int, ...]  # by verdict
    latency: tuple[int, ...]  # by bucket


@dataclass(frozen=True, slots=True)
class ExportCount:
    """What passed through one export."""

    operations: dict[str, OperationCount]  # by the number of the command; those that were asked for
    blocks_trimmed: int
    throttled_requests: int
    throttled_nanoseconds: int


@dataclass(frozen=True, slots=True)
class PoolCount:
    """What one pool counted, and what was done for it."""

    counters: dict[str, int] = field(default_factory=dict)  # by the names of PoolStats
    totals: dict[str, RunTotals] = field(default_factory=dict)  # by kind of run, as the next
    decisions: dict[str, dict[str, int]] = field(default_factory=dict)
    scrubbed_objects: int = 0
    scrubbed_blocks: int = 0
