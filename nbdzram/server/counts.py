"""Plain records of what an export's traffic counters say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

LATENCY_BOUNDS_SECONDS = tuple(2**k / 1e6 for k in range(23))
"""Upper bounds of OperationCounts.latency_buckets; one more bucket holds the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCounts:
    """One operation of one export."""

    requests: int
    size_bytes: int  # of requests that succeeded
    errors: dict[str, int]  # by cause: the names of Verdict in lower case; only causes that occurred
    latency_seconds: float  # sum over all requests, from arrival to reply
    latency_buckets: tuple[int, ...]  # requests in each bucket, not cumulative


class IoStat(NamedTuple):
    """zram's io_stat line (Documentation/admin-guide/blockdev/zram), in its order."""

    failed_reads: int
    failed_writes: int
    invalid_io: int
    notify_free: int  # blocks given back by TRIM
