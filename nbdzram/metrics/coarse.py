"""What strangers read of a pool: figures so coarse that a single block does not show in them.

Whoever reaches the metrics sees counters of pools that several tenants share. Exact, they would tell a tenant whether
somebody else has a block: write it, let a fold run, and see whether an object more or less is there. So what depends on
whether content is equal is rounded down, to OBJECTS or BYTES, for every pool that does not tell sharing anyway
(tell_sharing). The control socket, which is the operator's, tells everything.

Known limits: patience beats rounding. A tenant who is alone in writing can bring a counter to the edge of a step with
blocks of its own, and then ask about one more; each question costs it a step. Keep the metrics' address from tenants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nbdzram.engine.stats import BLOCK_SIZE, DiskUsage, PoolStats
from nbdzram.status import MaintenanceStatus, PoolStatus, ServerStatus

OBJECTS = 16  # counts of objects and pages are told in these steps
BYTES = OBJECTS * BLOCK_SIZE

SIZES = ("compr_data_size", "mem_used_total", "mem_used_max", "metadata", "shared_bytes", "recompress_untried")
COUNTS = (
    *("pages_compacted", "huge_pages", "huge_pages_since", "pages_folded", "objects", "handles", "shared_objects"),
    *("fold_pending", "objects_folded", "inline_folded", "objects_moved", "objects_recompressed", "zspages"),
)
"""Of PoolStats; the others do not depend on what is equal to what."""


def for_strangers(status: ServerStatus) -> ServerStatus:
    """The same, for whoever reaches the metrics."""
    return replace(status, pools=tuple(pool if pool.tells_sharing else _coarse(pool) for pool in status.pools))


def usage_for_strangers(usage: Mapping[str, DiskUsage]) -> dict[str, DiskUsage]:
    """What each export's blocks cost, likewise."""
    return {
        name: replace(
            one,
            compressed=_down(one.compressed, BYTES),
            unique=_down(one.unique, BYTES),
            shared=_down(one.compressed, BYTES) - _down(one.unique, BYTES),
        )
        for name, one in usage.items()
    }


def _coarse(pool: PoolStatus) -> PoolStatus:
    return replace(pool, stats=_coarse_stats(pool.stats), maintenance=_coarse_runs(pool.maintenance))


def _coarse_stats(stats: PoolStats) -> PoolStats:
    sizes = {name: _down(getattr(stats, name), BYTES) for name in SIZES}
    counts = {name: _down(getattr(stats, name), OBJECTS) for name in COUNTS}
    codecs = {codec: _down(size, BYTES) for codec, size in stats.compr_by_codec.items()}
    return replace(stats, **sizes, **counts, compr_by_codec=codecs)


def _coarse_runs(maintenance: MaintenanceStatus) -> MaintenanceStatus:
    totals = {kind: replace(run, bytes_freed=_down(run.bytes_freed, BYTES)) for kind, run in maintenance.totals.items()}
    recent = tuple(
        replace(run, bytes_freed=_down(run.bytes_freed, BYTES), result=_coarse_result(run.result))
        for run in maintenance.recent
    )
    return replace(maintenance, totals=totals, recent=recent)


def _coarse_result(result: Mapping[str, int]) -> dict[str, int]:
    return {name: _down(value, BYTES if "bytes" in name else OBJECTS) for name, value in result.items()}


def _down(value: int, step: int) -> int:
    return value - value % step
