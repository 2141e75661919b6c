"""How much one export may take: configured, changed at run time, told by a server. It loads little."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an export may take of its pool, and what its clients may ask for a second. 0: as much as there is."""

    quota_bytes: int = 0  # of blocks that are stored
    iops: int = 0  # requests a second
    iops_burst: int = 0  # of them at once, when there were none for a while; 0: a second's
    bandwidth_bytes: int = 0  # a second, read and written together
    bandwidth_burst_bytes: int = 0  # of them at once; 0: a second's


UNBOUND = Bounds()
