"""What a server holds, with a few words on itself: a table is made without them, and faster."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.status.holdings import Holdings


@dataclass(frozen=True, slots=True)
class Account(Holdings):
    """Of a ServerStatus, what it holds and what `stat --json` says of the server."""

    version: str
    pid: int
    uptime_seconds: float
    uris: tuple[str, ...]
    connections: int
    latency_bounds_seconds: tuple[float, ...]
