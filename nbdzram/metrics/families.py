"""Every metric of pools, exports and the server, as one table. The process describes itself in process.py.

Names: `nbdzram_` and the kernel's own field where zram has one (Documentation/admin-guide/blockdev/zram: mm_stat,
io_stat), with _bytes or _total as Prometheus asks. Labels come from fixed sets and from the operator's own names of
pools and exports; never from clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nbdzram.bounds import Bounds
from nbdzram.engine.stats import PoolStats
from nbdzram.metrics.exposition import Family, Sample, Samples, histogram, labels
from nbdzram.status import (
    CheckpointStatus,
    ExportStatus,
    HeadroomStatus,
    JournalStatus,
    OperationStatus,
    RunTotals,
    ScrubStatus,
    ServerStatus,
    ThreadStatus,
)

LATENCY_STEP = 2  # every second of the server's buckets: a factor of four between bounds, 4 us to 4 s


def _labelled(*names: str) -> Callable[[Callable[[ServerStatus], Iterator[Sample]]], Samples]:
    return lambda of: Samples(names, of)


def _server(value: Callable[[ServerStatus], float]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        yield "", value(status)

    return Samples((), samples)


def _pool(value: Callable[[PoolStats], float]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for pool in status.pools:
            yield labels(pool=pool.name), value(pool.stats)

    return Samples(("pool",), samples)


def _export(value: Callable[[ExportStatus], float]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for export in status.exports:
            yield labels(pool=export.pool, export=export.name), value(export)

    return Samples(("pool", "export"), samples)


def _bound(value: Callable[[Bounds], int]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for export in status.exports:
            if value(export.bounds):
                yield labels(pool=export.pool, export=export.name), value(export.bounds)

    return Samples(("pool", "export"), samples)


def _limited(value: Callable[[ExportStatus], float]) -> Samples:
    """Few exports are: to tell of the others what cannot be costs a scrape."""

    def samples(status: ServerStatus) -> Iterator[Sample]:
        for export in status.exports:
            if export.throttled_requests or export.bounds.iops or export.bounds.bandwidth_bytes:
                yield labels(pool=export.pool, export=export.name), value(export)

    return Samples(("pool", "export"), samples)


def _operation(value: Callable[[OperationStatus], float]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for export in status.exports:
            opened = labels(pool=export.pool, export=export.name)[:-1]
            for name, operation in export.operations.items():
                yield f'{opened},operation="{name}"}}', value(operation)

    return Samples(("pool", "export", "operation"), samples)


@_labelled("pool", "export", "operation", "cause")
def _errors(status: ServerStatus) -> Iterator[Sample]:
    for export in status.exports:
        opened = labels(pool=export.pool, export=export.name)[:-1]
        for name, operation in export.operations.items():
            for cause, count in operation.errors.items():
                yield f'{opened},operation="{name}",cause="{cause}"}}', count


@_labelled("pool", "export", "operation", "le")
def _latency(status: ServerStatus) -> Iterator[Sample]:
    """Only of operations that were used: a histogram of zeroes tells nothing and costs a scrape."""
    chosen = range(LATENCY_STEP, len(status.latency_bounds_seconds), LATENCY_STEP)
    bounds = [(repr(status.latency_bounds_seconds[index]), index + 1) for index in chosen]
    for export in status.exports:
        opened = labels(pool=export.pool, export=export.name)[:-1]
        for name, operation in export.operations.items():
            if operation.requests:
                label_set = f'{opened},operation="{name}"}}'
                yield from histogram(label_set, bounds, operation.latency_counts, operation.latency_sum_seconds)


def _runs(value: Callable[[RunTotals], float]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for pool in status.pools:
            for kind, totals in pool.maintenance.totals.items():
                yield labels(pool=pool.name, kind=kind), value(totals)

    return Samples(("pool", "kind"), samples)


@_labelled("pool", "kind")
def _running(status: ServerStatus) -> Iterator[Sample]:
    for pool in status.pools:
        for kind in pool.maintenance.totals:
            yield labels(pool=pool.name, kind=kind), int(pool.maintenance.running == kind)


@_labelled("pool", "kind")
def _waiting(status: ServerStatus) -> Iterator[Sample]:
    for pool in status.pools:
        waiting = [run.kind for run in pool.maintenance.queue if run.state == "waiting"]
        for kind in pool.maintenance.totals:
            yield labels(pool=pool.name, kind=kind), waiting.count(kind)


@_labelled("pool", "kind", "reason")
def _decisions(status: ServerStatus) -> Iterator[Sample]:
    for pool in status.pools:
        for kind, reasons in pool.maintenance.decisions.items():
            for reason, count in reasons.items():
                yield labels(pool=pool.name, kind=kind, reason=reason), count


@_labelled("pool", "kind")
def _waits(status: ServerStatus) -> Iterator[Sample]:
    for pool in status.pools:
        for kind, seconds in pool.maintenance.next_allowed_seconds.items():
            yield labels(pool=pool.name, kind=kind), seconds


@_labelled("pool", "codec")
def _codecs(status: ServerStatus) -> Iterator[Sample]:
    for pool in status.pools:
        for codec, size in pool.stats.compr_by_codec.items():
            yield labels(pool=pool.name, codec=codec), size


def _threads(value: Callable[[ThreadStatus], float]) -> Samples:
    @_labelled("thread")
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for thread in status.threads:
            yield labels(thread=str(thread.number)), value(thread)

    return samples


@_labelled("cause")
def _handshake_failures(status: ServerStatus) -> Iterator[Sample]:
    for cause, count in status.handshake_failures.items():
        yield labels(cause=cause), count


MM_STAT = (
    Family("nbdzram_orig_data_size_bytes", "gauge", "Uncompressed size of the blocks stored.", _pool(lambda s: s.orig_data_size)),
    Family("nbdzram_compr_data_size_bytes", "gauge", "Compressed size of the distinct objects stored.", _pool(lambda s: s.compr_data_size)),
    Family("nbdzram_mem_used_total_bytes", "gauge", "Memory of stored objects, fragmentation included, metadata not.", _pool(lambda s: s.mem_used_total)),
    Family("nbdzram_mem_limit_bytes", "gauge", "Most memory of the pool, metadata included; 0 is no limit.", _pool(lambda s: s.mem_limit)),
    Family("nbdzram_mem_used_max_bytes", "gauge", "Highest memory of stored objects so far.", _pool(lambda s: s.mem_used_max)),
    Family("nbdzram_same_pages", "gauge", "Blocks of one repeated word, which take no object.", _pool(lambda s: s.same_pages)),
    Family("nbdzram_pages_compacted_total", "counter", "Pages that compaction gave back.", _pool(lambda s: s.pages_compacted)),
    Family("nbdzram_huge_pages", "gauge", "Blocks that did not compress and are stored raw.", _pool(lambda s: s.huge_pages)),
    Family("nbdzram_huge_pages_since_total", "counter", "Blocks ever stored raw.", _pool(lambda s: s.huge_pages_since)),
    Family("nbdzram_pages_folded_total", "counter", "Pages that folding gave back.", _pool(lambda s: s.pages_folded)),
)  # fmt: skip


def _scrub(value: Callable[[ScrubStatus], float | None]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        for pool in status.pools:
            known = value(pool.scrub)
            if known is not None:
                yield labels(pool=pool.name), known

    return Samples(("pool",), samples)


POOL = (
    Family("nbdzram_scrub_objects_total", "counter", "Objects held against what was written, by scrubs and checks.", _scrub(lambda s: s.objects)),
    Family("nbdzram_scrub_blocks_total", "counter", "Blocks whose entries they looked at.", _scrub(lambda s: s.blocks)),
    Family("nbdzram_scrub_rotten_blocks", "gauge", "Blocks that are not what was written, as the last one found that was finished.", _scrub(lambda s: s.rotten_blocks)),
    Family("nbdzram_scrub_timestamp_seconds", "gauge", "When the last one was finished; absent before.", _scrub(lambda s: s.finished_at)),
    Family("nbdzram_memory_used_bytes", "gauge", "Memory of the pool in all: what the limit bounds.", _pool(lambda s: s.memory_used)),
    Family("nbdzram_metadata_bytes", "gauge", "Memory of tables, handles, indexes and dictionaries.", _pool(lambda s: s.metadata)),
    Family("nbdzram_fragmentation_bytes", "gauge", "Memory of zspages that holds no object.", _pool(lambda s: s.mem_used_total - s.compr_data_size)),
    Family("nbdzram_saved_bytes", "gauge", "What the pool spares its host, metadata deducted.", _pool(lambda s: s.saved)),
    Family("nbdzram_shared_bytes", "gauge", "Compressed bytes that shared objects save now; block tables that clones share save more, not counted here.", _pool(lambda s: s.shared_bytes)),
    Family("nbdzram_codec_bytes", "gauge", "Compressed size of distinct objects by codec.", _codecs),
    Family("nbdzram_objects", "gauge", "Distinct objects stored.", _pool(lambda s: s.objects)),
    Family("nbdzram_shared_objects", "gauge", "Objects that more than one block uses.", _pool(lambda s: s.shared_objects)),
    Family("nbdzram_handles", "gauge", "Live handles on objects.", _pool(lambda s: s.handles)),
    Family("nbdzram_zspages", "gauge", "Runs of pages that hold objects.", _pool(lambda s: s.zspages)),
    Family("nbdzram_fold_pending_objects", "gauge", "Objects that the next fold will look at.", _pool(lambda s: s.fold_pending)),
    Family("nbdzram_objects_folded_total", "counter", "Objects merged away by folding or inline deduplication.", _pool(lambda s: s.objects_folded)),
    Family("nbdzram_inline_folded_total", "counter", "Writes that found their content already stored.", _pool(lambda s: s.inline_folded)),
    Family("nbdzram_objects_moved_total", "counter", "Objects that compaction moved.", _pool(lambda s: s.objects_moved)),
    Family("nbdzram_objects_recompressed_total", "counter", "Objects stored again with a stronger codec.", _pool(lambda s: s.objects_recompressed)),
    Family("nbdzram_rotten_blocks_total", "counter", "Times that a stored block was found not to be what was written.", _pool(lambda s: s.blocks_rotten)),
    Family("nbdzram_pool_full_total", "counter", "Writes refused because the pool was at its limit.", _pool(lambda s: s.failed_writes)),
    Family("nbdzram_maintenance_runs_total", "counter", "Maintenance runs that came to their end.", _runs(lambda t: t.runs)),
    Family("nbdzram_maintenance_failures_total", "counter", "Maintenance runs that failed.", _runs(lambda t: t.failures)),
    Family("nbdzram_maintenance_seconds_total", "counter", "Time that maintenance runs took.", _runs(lambda t: t.seconds)),
    Family("nbdzram_maintenance_cpu_seconds_total", "counter", "Processor time that maintenance runs took.", _runs(lambda t: t.cpu_seconds)),
    Family("nbdzram_maintenance_freed_bytes_total", "counter", "Memory that maintenance runs gave back.", _runs(lambda t: t.bytes_freed)),
    Family("nbdzram_maintenance_running", "gauge", "Whether a run of this kind is under way.", _running),
    Family("nbdzram_maintenance_waiting_runs", "gauge", "Maintenance runs that wait for the one under way.", _waiting),
    Family("nbdzram_maintenance_decisions_total", "counter", "Why automatic runs started or did not.", _decisions),
    Family("nbdzram_maintenance_wait_seconds", "gauge", "For how long automatic runs still wait.", _waits),
)  # fmt: skip

EXPORT = (
    Family("nbdzram_export_size_bytes", "gauge", "Size that clients see.", _export(lambda e: e.size_bytes)),
    Family("nbdzram_export_stored_bytes", "gauge", "Uncompressed size of its stored blocks.", _export(lambda e: e.stored_bytes)),
    Family("nbdzram_export_same_filled_bytes", "gauge", "Size of its blocks of one repeated word.", _export(lambda e: e.same_filled_bytes)),
    Family("nbdzram_export_quota_bytes", "gauge", "Most stored bytes that it may have; absent without a quota.", _bound(lambda b: b.quota_bytes)),
    Family("nbdzram_export_iops_limit", "gauge", "Requests a second that it is limited to; absent without.", _bound(lambda b: b.iops)),
    Family("nbdzram_export_bandwidth_limit_bytes", "gauge", "Bytes a second that it is limited to; absent without.", _bound(lambda b: b.bandwidth_bytes)),
    Family("nbdzram_throttled_requests_total", "counter", "Requests that waited, as the export's limits were reached; absent where none is set, and none waited.", _limited(lambda e: e.throttled_requests)),
    Family("nbdzram_throttled_seconds_total", "counter", "Time that they waited before they began; the same.", _limited(lambda e: e.throttled_seconds)),
    Family("nbdzram_export_connections", "gauge", "Clients attached.", _export(lambda e: e.connections)),
    Family("nbdzram_failed_reads_total", "counter", "Reads that failed.", _export(lambda e: e.failed_reads)),
    Family("nbdzram_failed_writes_total", "counter", "Writes that failed.", _export(lambda e: e.failed_writes)),
    Family("nbdzram_invalid_io_total", "counter", "Requests that were wrong in themselves.", _export(lambda e: e.invalid_io)),
    Family("nbdzram_notify_free_total", "counter", "Blocks that clients gave back by TRIM.", _export(lambda e: e.notify_free)),
    Family("nbdzram_requests_total", "counter", "Requests by operation.", _operation(lambda o: o.requests)),
    Family("nbdzram_request_bytes_total", "counter", "Bytes of requests that succeeded.", _operation(lambda o: o.bytes)),
    Family("nbdzram_request_errors_total", "counter", "Requests that failed, by cause.", _errors),
    Family("nbdzram_request_duration_seconds", "histogram", "Time from a request's arrival to its reply.", _latency),
)  # fmt: skip


def _if_known(value: Callable[[ServerStatus], float | None]) -> Samples:
    def samples(status: ServerStatus) -> Iterator[Sample]:
        known = value(status)
        if known is not None:
            yield "", known

    return Samples((), samples)


def _of_state_dir(value: Callable[[ServerStatus], int]) -> Samples:
    return _if_known(lambda s: value(s) if s.state_dir_size_bytes else None)


def _checkpoint(value: Callable[[CheckpointStatus], float | None]) -> Samples:
    return _if_known(lambda s: value(s.checkpoint) if s.checkpoint is not None else None)


def _journal(value: Callable[[JournalStatus], float]) -> Samples:
    return _if_known(lambda s: value(s.journal) if s.journal is not None else None)


def _headroom(value: Callable[[HeadroomStatus], float]) -> Samples:
    return _if_known(lambda s: value(s.headroom) if s.headroom is not None else None)


SERVER = (
    Family("nbdzram_connections", "gauge", "Connections, handshakes under way included.", _server(lambda s: s.connections)),
    Family("nbdzram_connections_accepted_total", "counter", "Connections since the start.", _server(lambda s: s.connections_total)),
    Family("nbdzram_handshake_failures_total", "counter", "Handshakes that failed, by cause.", _handshake_failures),
    Family("nbdzram_protocol_errors_total", "counter", "Connections ended because the peer broke the protocol.", _server(lambda s: s.protocol_errors)),
    Family("nbdzram_event_loop_lag_seconds", "gauge", "How late the event loop woke at the last sample.", _server(lambda s: s.event_loop_lag_seconds)),
    Family("nbdzram_io_thread_clients", "gauge", "Clients that a thread serves.", _threads(lambda t: t.clients)),
    Family("nbdzram_io_thread_busy_seconds_total", "counter", "Time that a thread spent in turns.", _threads(lambda t: t.busy_seconds)),
    Family("nbdzram_io_thread_longest_turn_seconds", "gauge", "Longest turn of a thread in the last interval.", _threads(lambda t: t.longest_turn_seconds)),
    Family("nbdzram_connections_limit", "gauge", "Connections that may be open at once.", _server(lambda s: s.connections_limit)),
    Family("nbdzram_tls_files_usable", "gauge", "Whether the TLS files on disk are those in use; 0: they changed and cannot be used.", _server(lambda s: int(s.tls_files_usable))),
    Family("nbdzram_tls_certificate_expiry_timestamp_seconds", "gauge", "When the certificate in use ends; absent without TLS.", _if_known(lambda s: s.certificate_expires_at)),
    Family("nbdzram_state_dir_size_bytes", "gauge", "Size of the state directory's file system; absent without one.", _of_state_dir(lambda s: s.state_dir_size_bytes)),
    Family("nbdzram_state_dir_free_bytes", "gauge", "What is free there; absent without a state directory.", _of_state_dir(lambda s: s.state_dir_free_bytes)),
    Family("nbdzram_checkpoint_timestamp_seconds", "gauge", "Moment of the newest checkpoint that is whole; absent without one.", _checkpoint(lambda c: c.moment)),
    Family("nbdzram_checkpoint_interval_seconds", "gauge", "From one checkpoint to the next; absent where none are taken.", _checkpoint(lambda c: c.interval_seconds)),
    Family("nbdzram_checkpoint_duration_seconds", "gauge", "Time that the last checkpoint took.", _checkpoint(lambda c: c.seconds)),
    Family("nbdzram_checkpoint_size_bytes", "gauge", "Size of the last checkpoint's file.", _checkpoint(lambda c: c.stream_bytes)),
    Family("nbdzram_checkpoint_failures_total", "counter", "Checkpoints that could not be taken.", _checkpoint(lambda c: c.failures)),
    Family("nbdzram_checkpoint_held_back_exports", "gauge", "Exports that cannot be read: the newest checkpoint has them as they were before, or not at all.", _checkpoint(lambda c: len(c.held_back))),
    Family("nbdzram_checkpoint_damaged_files", "gauge", "Checkpoints and journals that a start could not use, and that are kept as *.damaged.", _checkpoint(lambda c: c.damaged_files)),
    Family("nbdzram_journal_usable", "gauge", "Whether FLUSH is answered by the journal; 0: it waits for the first checkpoint, or fails. Absent without one.", _journal(lambda j: int(j.usable))),
    Family("nbdzram_journal_groups_total", "counter", "Groups written and synced; each answers all who waited.", _journal(lambda j: j.groups)),
    Family("nbdzram_journal_written_bytes_total", "counter", "Bytes of these groups.", _journal(lambda j: j.group_bytes)),
    Family("nbdzram_journal_size_bytes", "gauge", "What a start would read of the journal behind the newest checkpoint.", _journal(lambda j: j.segment_bytes)),
    Family("nbdzram_journal_group_duration_seconds", "gauge", "Time that the last group took, from its moment to its being on the disk.", _journal(lambda j: j.seconds)),
    Family("nbdzram_journal_failures_total", "counter", "Groups that could not be written or synced.", _journal(lambda j: j.failures)),
    Family("nbdzram_journal_held_back_exports", "gauge", "Exports that cannot be read: their FLUSH fails, and the journal has them as they were.", _journal(lambda j: len(j.held_back))),
    Family("nbdzram_headroom_limit_bytes", "gauge", "Memory of the cgroup or machine that has the least left; absent where nobody looks.", _headroom(lambda h: h.limit_bytes)),
    Family("nbdzram_headroom_free_bytes", "gauge", "What it has left, page cache that can be dropped included.", _headroom(lambda h: h.free_bytes)),
    Family("nbdzram_headroom_reserve_bytes", "gauge", "What of that pools do not take.", _headroom(lambda h: h.reserve_bytes)),
    Family("nbdzram_memory_short", "gauge", "Whether memory is short: writes that need more are refused.", _headroom(lambda h: int(h.short))),
    Family("nbdzram_memory_shortages_total", "counter", "How often memory became short.", _headroom(lambda h: h.shortages)),
    Family("nbdzram_draining", "gauge", "Whether the server is about to end.", _server(lambda s: int(s.draining))),
)  # fmt: skip

FAMILIES = (*MM_STAT, *POOL, *EXPORT, *SERVER)
"""In the order in which they are published; process.py's follow."""
