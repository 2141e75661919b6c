"""Of exports, with what was asked of them: most of what is told of one."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.status.exports import ExportFigures


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """One operation's traffic on one export since the server started."""

    requests: int
    bytes: int  # payload read or written; for trim and write_zeroes the length of the range
    errors: dict[str, int]  # by cause, from a fixed set
    latency_counts: tuple[int, ...]  # requests a bucket (not cumulative), the last one above every bound
    latency_sum_seconds: float


@dataclass(frozen=True, slots=True)
class ExportStatus(ExportFigures):
    """One export: what it is, what it holds, who uses it, what was asked of it."""

    operations: dict[str, OperationStatus]
