"""Of exports; what was asked of them is traffic.py's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nbdzram.bounds import Bounds


def default_trouble(name: str | None, there: Collection[str]) -> tuple[str, str] | None:
    """What is wrong with the name of the default export, beside those that are there, and what to do about it."""
    if name is None or name in there:
        return None
    import difflib  # noqa: PLC0415 - only a mistake pays for it

    near = difflib.get_close_matches(name, there, n=1)
    says = f"the default export is '{name}', and no export has that name: clients that name none are refused"
    return says, f"did you mean '{near[0]}'?" if near else "add one of that name, or leave default_export out"


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
