"""Of pools; what is done in them is maintenance.py's."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.engine.stats import PoolStats
from nbdzram.units import format_sizes


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One pool: how it is set, and what it counts."""

    name: str
    path: str | None  # the arena's file; None: anonymous memory
    dedup: str
    tells_sharing: bool  # clients may find out what others store: figures for strangers are not rounded
    verify: bool  # what is read is held against its fingerprint
    stats: PoolStats


LEAST_LIMIT = 1 << 20  # tables of a small disk and a page for each size of object: below it nothing can be written


def limit_trouble(name: str, mem_limit: int, used_bytes: int = 0) -> tuple[str, str] | None:
    """What is wrong with a pool's limit, of a pool that takes so much, and what to do about it; None: nothing."""
    if 0 < mem_limit < LEAST_LIMIT:
        says = f"the pool '{name}' has a limit of {mem_limit} bytes, too few to write anything"
        return says, "a number without a suffix is bytes: write 1G, 512M or 50%"
    if used_bytes > mem_limit > 0:
        takes, allowed = format_sizes(used_bytes, mem_limit)
        over = f"takes {takes}, over its limit of {allowed}"
        says = f"the pool '{name}' {over}: what is stored stays, and writes that need memory fail"
        return says, "fold it, trim or remove disks, or raise the limit"
    return None
