"""What strangers read of a pool: figures so coarse that a single block does not show in them.

Whoever reaches the metrics sees counters of pools that several tenants share. Exact, they would tell a tenant whether
somebody else has a block: write it, let a fold run, and see whether an object more or less is there. So what depends on
whether content is equal is rounded down, to OBJECTS or BYTES, for every pool that does not tell sharing anyway
(tell_sharing). So is what of the server, its file systems and its memory shows a page of such a pool: a block that is
stored no second time is missing in a checkpoint, and in what is left, to the byte. The control socket, which is the
operator's, tells everything.

Known limits: patience beats rounding. A tenant who is alone in writing can bring a counter to the edge of a step with
blocks of its own, and then ask about one more; each question costs it a step. Keep the metrics' address from tenants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from nbdzram.engine.stats import BLOCK_SIZE, DiskUsage, PoolStats
from nbdzram.status import HistorySample, MaintenanceStatus, PoolStatus, RunStatus, ServerStatus

Work = TypeVar("Work", MaintenanceStatus, RunStatus)

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
    if all(pool.tells_sharing for pool in status.pools):
        return status
    return replace(
        status,
        pools=tuple(pool if pool.tells_sharing else _coarse(pool) for pool in status.pools),
        state_dir_free_bytes=in_steps(status.state_dir_free_bytes),
        checkpoint=status.checkpoint and _coarse_sizes(status.checkpoint, "stream_bytes"),
        journal=status.journal and _coarse_sizes(status.journal, "group_bytes", "segment_bytes"),
        headroom=status.headroom and _coarse_sizes(status.headroom, "free_bytes"),
    )


def history_for_strangers(samples: Iterable[HistorySample]) -> Iterator[HistorySample]:
    """The last hours, likewise."""
    return (replace(sample, memory_bytes=in_steps(sample.memory_bytes)) for sample in samples)


def in_steps(size_bytes: int) -> int:
    """What of a size strangers may know."""
    return _down(size_bytes, BYTES)


def usage_for_strangers(usage: Mapping[str, DiskUsage]) -> dict[str, DiskUsage]:
    """What each export's blocks cost, likewise."""
    return {
        name: replace(
            one,
            compressed=_down(one.compressed, BYTES),
            unique=_down(one.unique, BYTES),
            shared=_down(one.compressed, BYTES) - _down(one.unique, BYTES),
            huge=_down(one.huge, BYTES),  # a block that folded into an equal one which was recompressed is not raw
        )
        for name, one in usage.items()
    }


def _coarse(pool: PoolStatus) -> PoolStatus:
    scrub = replace(pool.scrub, objects=_down(pool.scrub.objects, OBJECTS))
    return replace(pool, stats=_coarse_stats(pool.stats), maintenance=_coarse_runs(pool.maintenance), scrub=scrub)


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
    queue = tuple(map(_coarse_work, maintenance.queue))
    return _coarse_work(replace(maintenance, totals=totals, recent=recent, queue=queue))


def _coarse_work(run: Work) -> Work:
    """How far a run is: a fold counts what it looks at."""
    return replace(run, done=_down(run.done, OBJECTS), total=_down(run.total, OBJECTS))


def _coarse_result(result: Mapping[str, int]) -> dict[str, int]:
    return {name: _down(value, BYTES if "bytes" in name else OBJECTS) for name, value in result.items()}


def _coarse_sizes(record: Any, *names: str) -> Any:
    return replace(record, **{name: in_steps(getattr(record, name)) for name in names})


def _down(value: int, step: int) -> int:
    return value - value % step
