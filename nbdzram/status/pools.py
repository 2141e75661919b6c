"""Of pools; what is done in them is maintenance.py's."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.engine.stats import PoolStats


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One pool: how it is set, and what it counts."""

    name: str
    path: str | None  # the arena's file; None: anonymous memory
    dedup: str
    tells_sharing: bool  # clients may find out what others store: figures for strangers are not rounded
    verify: bool  # what is read is held against its fingerprint
    stats: PoolStats
