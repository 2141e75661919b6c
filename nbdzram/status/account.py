"""What a server holds, with all that was asked of it and a few words on itself: tables are made without, and faster."""

from __future__ import annotations

from typing import NamedTuple

from nbdzram.status.pools import PoolFigures
from nbdzram.status.traffic import ExportStatus


class Account(NamedTuple):
    """Of a ServerStatus, what it holds and what `stat --json` says of the server."""

    pools: tuple[PoolFigures, ...]
    exports: tuple[ExportStatus, ...]
    version: str
    pid: int
    uptime_seconds: float
    uris: tuple[str, ...]
    connections: int
    latency_bounds_seconds: tuple[float, ...]
