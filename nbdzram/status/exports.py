"""Of exports; what was asked of them is traffic.py's."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.bounds import Bounds


@dataclass(frozen=True, slots=True)
class ExportFigures:
    """One export: what it is, what it holds, who uses it."""

    name: str
    pool: str
    size_bytes: int
    read_only: bool
    description: str
    admits: str  # everyone, listed (the two lists below) or nobody (its rules are not known)
    allow_addresses: tuple[str, ...]
    allow_certificates: tuple[str, ...]
    private: bool  # its blocks share objects with its own and its clones' alone
    bounds: Bounds
    stored_bytes: int  # blocks stored, same-filled included
    same_filled_bytes: int
    connections: int
    failed_reads: int  # the four fields of zram's io_stat
    failed_writes: int
    invalid_io: int
    notify_free: int
    throttled_requests: int  # that its limits let wait before they began
    throttled_seconds: float  # that they waited
