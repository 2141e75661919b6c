"""What the dashboard shows: rows, panels and queries as tables, and why each is worth a glance.

Rows of disks and of who uses them; those of what carries them are machine.py's.
"""

from __future__ import annotations

from deploy.grafana.machine import CHECKPOINTS, HEADROOM, LATE, PROCESS
from deploy.grafana.model import (
    PAGE_BYTES,
    Annotation,
    Kind,
    Panel,
    Query,
    Row,
    export,
    increase,
    pool,
    quantile,
    rate,
    server,
    total,
)

DAY = 86400
ENDS = "tls_certificate_expiry_timestamp_seconds"
OF_POOL_AND_KIND = "{{instance}} {{pool}} {{kind}}"
OF_EXPORT = ("instance", "export")
LATENCY = "request_duration_seconds_bucket"
STORED = total(pool("memory_used_bytes"))
# A pool without a limit publishes 0, which must not count as a limit that was reached.
LIMITED = f"({pool('mem_limit_bytes')} > 0)"

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Servers down",
            "Servers that Prometheus does not reach; 1 too when it knows none. Other programs' targets do not count.",
            "short",
            (Query(f"sum(1 - {server('up')}) or absent({server('up')})", "down"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (1, "red")),
        ),
        Panel(
            "Fullest pool",
            "Memory against the limit, of the pool that is nearest to it. At the limit writes get "
            "'no space left on device'. 0 when no chosen pool has a limit.",
            "percentunit",
            (Query(f"max({pool('memory_used_bytes')} / {LIMITED}) or vector(0)", "used"),),
            Kind.GAUGE, 4, 4, maximum=1, thresholds=((0, "green"), (0.8, "orange"), (0.9, "red")),
        ),
        Panel(
            "Ratio",
            "Uncompressed size of what is stored over the memory it takes, metadata included. Compression, blocks of "
            "one word and folding all count. 0 when nothing is stored.",
            "short",
            (Query(f"({total(pool('orig_data_size_bytes'))} / ({STORED} > 0)) or vector(0)", "ratio"),),
            Kind.STAT, 3, 4, decimals=2, thresholds=((0, "green"), (1e-9, "red"), (1, "orange"), (1.5, "green")),
        ),
        Panel(
            "Saved",
            "What the pools spare their hosts, metadata deducted.",
            "bytes",
            (Query(total(pool("saved_bytes")), "saved"),),
            Kind.STAT, 3, 4,
        ),
        Panel(
            "Requests",
            "Requests a second, of all operations.",
            "reqps",
            (Query(total(rate(export("requests_total"))), "requests"),),
            Kind.STAT, 3, 4,
        ),
        Panel(
            "Slowest hundredth",
            "Latency that one request in a hundred exceeds, from its arrival to its reply. 0 when there is none.",
            "s",
            (Query(f"({quantile(0.99, export(LATENCY))} > 0) or vector(0)", "p99"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (0.05, "orange"), (0.5, "red")),
        ),
        Panel(
            "Clients",
            "Connections, handshakes under way included.",
            "short",
            (Query(total(server("connections")), "connections"),),
            Kind.STAT, 2, 4,
        ),
        Panel(
            "Failing requests",
            "Requests a second that got an error. Not every one is the server's: a read past the end counts too.",
            "reqps",
            (Query(f"{total(rate(export('request_errors_total')))} or vector(0)", "errors"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (0.01, "orange"), (1, "red")),
        ),
        Panel(
            "Writes refused",
            "Writes a second that pools refused at their limit, or for lack of room in their file system.",
            "reqps",
            (Query(f"{total(rate(pool('pool_full_total')))} or vector(0)", "refused"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (1e-9, "red")),
        ),
        Panel(
            "Connections near their limit",
            "Connections over the setting limits.connections, of the server that is nearest to it.",
            "percentunit",
            (Query(f"max({server('connections')} / {server('connections_limit')})", "used"),),
            Kind.GAUGE, 3, 4, maximum=1, thresholds=((0, "green"), (0.8, "orange"), (0.9, "red")),
        ),
        Panel(
            "Descriptors near their limit",
            "Open descriptors over the process's limit, of the server that is nearest to it.",
            "percentunit",
            (Query(f"max({server('process_open_fds')} / {server('process_max_fds')})", "used"),),
            Kind.GAUGE, 3, 4, maximum=1, thresholds=((0, "green"), (0.8, "orange"), (0.9, "red")),
        ),
        Panel(
            "State directory",
            "How full the file system of the state directory is, where there is one, of the server with the least "
            "room. When it is full, writes are refused and changes cannot be remembered.",
            "percentunit",
            (
                Query(
                    f"max(1 - {server('state_dir_free_bytes')} / {server('state_dir_size_bytes')}) or vector(0)",
                    "used",
                ),
            ),
            Kind.GAUGE, 3, 4, maximum=1, thresholds=((0, "green"), (0.9, "orange"), (0.95, "red")),
        ),
        Panel(
            "Certificate ends in",
            "The first TLS certificate to end. Ten years when no server has one.",
            "s",
            (Query(f"min({server(ENDS)}) - time() or vector({10 * 365.25 * DAY:.0f})", "left"),),
            Kind.STAT, 3, 4, thresholds=((0, "red"), (3 * DAY, "orange"), (14 * DAY, "green")),
        ),
        Panel(
            "TLS files that cannot be used",
            "Servers whose TLS files changed on disk and cannot be used: they keep the old ones.",
            "short",
            (Query(f"sum(1 - {server('tls_files_usable')}) or vector(0)", "servers"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (1, "red")),
        ),
        Panel(
            "Checkpoints late",
            "Servers whose newest checkpoint is older than five intervals and a minute, or that have had none for so "
            "long, as the alert NbdzramCheckpointOld has it.",
            "short",
            (Query(f"count({LATE}) or vector(0)", "servers"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (1, "red")),
        ),
        Panel(
            "Memory short",
            "Servers whose machine or cgroup has no more left than the reserve: writes that need memory are refused.",
            "short",
            (Query(f"sum({server('memory_short')}) or vector(0)", "servers"),),
            Kind.STAT, 3, 4, thresholds=((0, "green"), (1, "red")),
        ),
    ),
    folded=False,
)  # fmt: skip

MEMORY = Row(
    "Memory",
    (
        Panel(
            "Where memory goes",
            "Unique bytes, what zspages hold beyond them, and metadata are memory in use. On top, what folding spares "
            "now: without it the stack would be resident. The limit is that of the pools that have one, and holds for "
            "the other three together.",
            "bytes",
            (
                Query(total(pool("compr_data_size_bytes")), "unique"),
                Query(total(pool("fragmentation_bytes")), "fragmentation"),
                Query(total(pool("metadata_bytes")), "metadata"),
                Query(total(pool("shared_bytes")), "saved by folding"),
                Query(total(LIMITED), "limit"),
            ),
            Kind.STACK, 16, 10,
            colours=(
                ("unique", "green"),
                ("fragmentation", "yellow"),
                ("metadata", "purple"),
                ("saved by folding", "light-blue"),
                ("limit", "red"),
            ),
            lines=("limit",),
        ),
        Panel(
            "Ratio of each pool",
            "Uncompressed size over memory, metadata included. Below 1 a pool costs more than plain memory would.",
            "short",
            (
                Query(
                    f"{total(pool('orig_data_size_bytes'), 'instance', 'pool')} / "
                    f"{total(pool('memory_used_bytes'), 'instance', 'pool')}",
                    "{{instance}} {{pool}}",
                ),
            ),
            height=10, decimals=2,
        ),
        Panel(
            "Stored by clients",
            "Uncompressed size of stored blocks, and how much of it is blocks of one repeated word, which take no "
            "object.",
            "bytes",
            (
                Query(total(pool("orig_data_size_bytes")), "stored"),
                Query(f"{total(pool('same_pages'))} * {PAGE_BYTES}", "same-filled"),
                Query(f"{total(pool('huge_pages'))} * {PAGE_BYTES}", "huge"),
            ),
            width=6,
        ),
        Panel(
            "By codec",
            "Compressed size of distinct objects by codec; raw are blocks that do not compress.",
            "bytes",
            (Query(total(pool("codec_bytes"), "codec"), "{{codec}}"),),
            Kind.STACK, 6,
        ),
        Panel(
            "Growth",
            "How fast memory in use grows, per pool. Divide what is left to the limit by it to know how long it lasts; "
            "the alert NbdzramPoolFullSoon does.",
            "Bps",
            (Query(f"deriv({pool('memory_used_bytes')}[$__rate_interval])", "{{instance}} {{pool}}"),),
            width=6,
        ),
        Panel(
            "Peak",
            "Highest memory of stored objects since the server started, against what is in use.",
            "bytes",
            (
                Query(total(pool("mem_used_total_bytes"), "instance", "pool"), "{{instance}} {{pool}} now"),
                Query(total(pool("mem_used_max_bytes"), "instance", "pool"), "{{instance}} {{pool}} highest"),
            ),
            width=6,
        ),
    ),
    folded=False,
)  # fmt: skip

FOLD = Row(
    "Folding and compaction",
    (
        Panel(
            "Runs",
            "Maintenance runs that came to their end, by kind.",
            "short",
            (Query(total(increase(pool("maintenance_runs_total")), "kind"), "{{kind}}"),),
            Kind.BARS,
        ),
        Panel(
            "Under way",
            "When a run of each kind is under way. A run shorter than the scrape interval may fall between two "
            "scrapes; the annotations show it all the same.",
            "short",
            (Query(f"max by (instance, pool, kind) ({pool('maintenance_running')})", OF_POOL_AND_KIND),),
            Kind.STATES,
        ),
        Panel(
            "Memory given back",
            "What runs freed, by kind.",
            "bytes",
            (Query(total(increase(pool("maintenance_freed_bytes_total")), "kind"), "{{kind}}"),),
            Kind.BARS,
        ),
        Panel(
            "Pages given back",
            "Pages that folding and compaction returned, as the kernel counts them in mm_stat.",
            "ops",
            (
                Query(total(rate(pool("pages_folded_total"))), "folded"),
                Query(total(rate(pool("pages_compacted_total"))), "compacted"),
            ),
            width=6,
        ),
        Panel(
            "Objects merged, moved, stored again",
            "What maintenance does with objects. Inline: writes whose content was already there.",
            "ops",
            (
                Query(total(rate(pool("objects_folded_total"))), "merged"),
                Query(total(rate(pool("inline_folded_total"))), "of them inline"),
                Query(total(rate(pool("objects_moved_total"))), "moved by compaction"),
                Query(total(rate(pool("objects_recompressed_total"))), "recompressed"),
                Query(total(rate(pool("scrub_objects_total"))), "looked at for rot"),
                Query(total(rate(pool("scrub_blocks_total"))), "blocks looked at for rot"),
            ),
            width=6,
        ),
        Panel(
            "Sharing",
            "Handles over objects tells how many blocks an object serves on average; 1 means that nothing is shared.",
            "short",
            (
                Query(total(pool("handles")), "handles"),
                Query(total(pool("objects")), "objects"),
                Query(total(pool("shared_objects")), "objects shared"),
                Query(total(pool("fold_pending_objects")), "waiting for a fold"),
            ),
            width=6,
        ),
        Panel(
            "Processor time of maintenance",
            "Share of one core. The setting cpu_percent bounds automatic runs; runs that a person asks for take what "
            "is idle.",
            "percentunit",
            (Query(total(rate(pool("maintenance_cpu_seconds_total")), "kind"), "{{kind}}"),),
            width=6,
        ),
        Panel(
            "Why automatic runs start or wait",
            "Decisions of the policy, by reason. Empty when neither folding nor compaction is automatic.",
            "ops",
            (Query(total(rate(pool("maintenance_decisions_total")), "kind", "reason"), "{{kind}}: {{reason}}"),),
            width=12,
            empty="no pool folds or compacts by itself",
        ),
        Panel(
            "Automatic runs wait",
            "For how long the policy backs off because earlier runs gained little; and how old the last scrub is.",
            "s",
            (
                Query(f"max by (instance, pool, kind) ({pool('maintenance_wait_seconds')})", OF_POOL_AND_KIND),
                Query(f"time() - {pool('scrub_timestamp_seconds')}", "{{instance}} {{pool}} last scrub"),
            ),
            width=12,
        ),
        Panel(
            "Runs that wait for their turn",
            "One run at a time works on a pool. `nbdzram runs` tells which one, and ends or holds it.",
            "short",
            (Query(total(pool("maintenance_waiting_runs"), "instance", "pool"), "{{instance}} {{pool}}"),),
            width=24,
        ),
    ),
)  # fmt: skip

IO = Row(
    "I/O",
    (
        Panel(
            "Requests",
            "Requests a second by operation, writes downwards.",
            "reqps",
            (Query(total(rate(export("requests_total")), "operation"), "{{operation}}"),),
            mirrored=("write",),
        ),
        Panel(
            "Throughput",
            "Bytes a second of requests that succeeded, writes downwards; for trim and write_zeroes the length of the "
            "range.",
            "Bps",
            (Query(total(rate(export("request_bytes_total")), "operation"), "{{operation}}"),),
            mirrored=("write",),
        ),
        Panel(
            "Request size",
            "Mean bytes a request, of operations that were used.",
            "bytes",
            (
                Query(
                    f"{total(rate(export('request_bytes_total')), 'operation')} / "
                    f"({total(rate(export('requests_total')), 'operation')} > 0)",
                    "{{operation}}",
                ),
            ),
            empty="no request lately",
        ),
        Panel(
            "Latency of reads",
            "From a request's arrival to its reply; brighter is more requests.",
            "s",
            (Query(total(increase(export(LATENCY, operation="read")), "le"), "{{le}}"),),
            Kind.HEATMAP, 12,
            empty="no read lately",
        ),
        Panel(
            "Latency of writes",
            "From a request's arrival to its reply; brighter is more requests.",
            "s",
            (Query(total(increase(export(LATENCY, operation="write")), "le"), "{{le}}"),),
            Kind.HEATMAP, 12,
            empty="no write lately",
        ),
        Panel(
            "Latency of reads, quantiles",
            "Half, one in a hundred and one in a thousand reads take longer.",
            "s",
            tuple(Query(quantile(q, export(LATENCY, operation="read")), f"p{100 * q:g}") for q in (0.5, 0.99, 0.999)),
            empty="no read lately",
        ),
        Panel(
            "Latency of writes, quantiles",
            "Half, one in a hundred and one in a thousand writes take longer.",
            "s",
            tuple(Query(quantile(q, export(LATENCY, operation="write")), f"p{100 * q:g}") for q in (0.5, 0.99, 0.999)),
            empty="no write lately",
        ),
        Panel(
            "Blocks trimmed",
            "Blocks a second that clients gave back by TRIM: what fstrim and discard come to.",
            "ops",
            (Query(total(rate(export("notify_free_total")), "instance", "export"), "{{instance}} {{export}}"),),
        ),
        Panel(
            "Waiting for a limit",
            "Requests that wait, on average, as their export's clients ask for more than it is limited to.",
            "short",
            (Query(total(rate(export("throttled_seconds_total")), "instance", "export"), "{{instance}} {{export}}"),),
            width=6,
            empty="no export has a limit of requests or bytes",
        ),
        Panel(
            "Wait for a limit",
            "For how long a request waited that had to, on average; it is not part of its latency.",
            "s",
            (
                Query(
                    f"{total(rate(export('throttled_seconds_total')), 'instance', 'export')} / "
                    f"({total(rate(export('throttled_requests_total')), 'instance', 'export')} > 0)",
                    "{{instance}} {{export}}",
                ),
            ),
            width=6,
            empty="no request had to wait lately",
        ),
        Panel(
            "Limits used",
            "Of the requests and bytes a second that exports are limited to. At 100 % requests wait.",
            "percentunit",
            (
                Query(
                    f"{total(rate(export('requests_total')), *OF_EXPORT)} / "
                    f"{total(export('export_iops_limit'), *OF_EXPORT)}",
                    "{{instance}} {{export}} requests",
                ),
                Query(
                    f"({total(rate(export('request_bytes_total', operation='read')), *OF_EXPORT)} + "
                    f"{total(rate(export('request_bytes_total', operation='write')), *OF_EXPORT)}) / "
                    f"{total(export('export_bandwidth_limit_bytes'), *OF_EXPORT)}",
                    "{{instance}} {{export}} bytes",
                ),
            ),
            width=6,
            empty="no export has a limit of requests or bytes",
        ),
        Panel(
            "Quota used",
            "Of what exports with a quota may store. At 100 % blocks are replaced and trimmed, and none is added.",
            "percentunit",
            (Query(f"{export('export_stored_bytes')} / {export('export_quota_bytes')}", "{{instance}} {{export}}"),),
            width=6,
            empty="no export has a quota",
        ),
    ),
    folded=False,
)  # fmt: skip

ERRORS = Row(
    "Errors",
    (
        Panel(
            "Failed requests by cause",
            "pool_full: the memory limit. over_quota: the export's own. unreadable: a stored block does not decode, "
            "which must never happen. The others are mistakes of clients.",
            "reqps",
            (Query(total(rate(export("request_errors_total")), "operation", "cause"), "{{operation}}: {{cause}}"),),
            empty="no request failed",
        ),
        Panel(
            "Failed I/O, as zram counts it",
            "The fields of io_stat, per second, and reads that found bytes other than those written.",
            "reqps",
            (
                Query(total(rate(export("failed_reads_total"))), "failed reads"),
                Query(total(rate(export("failed_writes_total"))), "failed writes"),
                Query(total(rate(export("invalid_io_total"))), "invalid"),
                Query(total(rate(pool("rotten_blocks_total"))), "reads of rotten blocks"),
                Query(total(pool("scrub_rotten_blocks")), "rotten blocks found by the last scrub", "short"),
            ),
        ),
        Panel(
            "Writes refused at the limit",
            "Writes that a pool could not take, per pool.",
            "reqps",
            (Query(total(rate(pool("pool_full_total")), "instance", "pool"), "{{instance}} {{pool}}"),),
        ),
        Panel(
            "Handshakes that failed",
            "By cause. A scanner of ports makes some; a client with a wrong name or certificate makes others.",
            "cps",
            (Query(total(rate(server("handshake_failures_total")), "cause"), "{{cause}}"),),
        ),
        Panel(
            "Connections that broke the protocol",
            "Ended by the server after their handshake: a faulty client, or a hostile one.",
            "cps",
            (Query(total(rate(server("protocol_errors_total")), "instance"), "{{instance}}"),),
        ),
        Panel(
            "Maintenance runs that failed",
            "Must stay at 0; the log has the reason.",
            "short",
            (
                Query(
                    total(increase(pool("maintenance_failures_total")), "instance", "pool", "kind"), OF_POOL_AND_KIND
                ),
            ),
            Kind.BARS,
        ),
    ),
)  # fmt: skip

EACH = ("instance", "pool", "export")
EXPORTS = Row(
    "Exports",
    (
        Panel(
            "Exports",
            "One line an export. Its name leads to this dashboard with only that export chosen.",
            "short",
            (
                Query(total(export("export_size_bytes"), *EACH), "Size", "bytes"),
                Query(total(export("export_stored_bytes"), *EACH), "Stored", "bytes"),
                Query(total(export("export_same_filled_bytes"), *EACH), "Same-filled", "bytes"),
                Query(total(export("export_connections"), *EACH), "Clients", "short"),
                Query(total(rate(export("request_bytes_total", operation="read")), *EACH), "Read", "Bps"),
                Query(total(rate(export("request_bytes_total", operation="write")), *EACH), "Written", "Bps"),
                Query(total(rate(export("requests_total")), *EACH), "Requests", "reqps"),
                Query(quantile(0.99, export(LATENCY), *EACH), "p99", "s"),
                Query(
                    total(rate(export("failed_writes_total")), *EACH)
                    + " + "
                    + total(rate(export("failed_reads_total")), *EACH),
                    "Failed",
                    "reqps",
                ),
            ),
            Kind.TABLE, 24, 9,
        ),
        Panel(
            "Requests of each export",
            "Requests a second.",
            "reqps",
            (Query(total(rate(export("requests_total")), "instance", "export"), "{{instance}} {{export}}"),),
        ),
        Panel(
            "Stored by each export",
            "Uncompressed size of stored blocks. Blocks shared with other exports count for each.",
            "bytes",
            (Query(total(export("export_stored_bytes"), "instance", "export"), "{{instance}} {{export}}"),),
            Kind.STACK,
        ),
        Panel(
            "Slowest hundredth of each export",
            "Latency that one request in a hundred exceeds.",
            "s",
            (Query(quantile(0.99, export(LATENCY), "instance", "export"), "{{instance}} {{export}}"),),
            empty="no request lately",
        ),
    ),
)  # fmt: skip

ROWS = (OVERVIEW, MEMORY, FOLD, IO, ERRORS, EXPORTS, CHECKPOINTS, HEADROOM, PROCESS)

ANNOTATIONS = (
    Annotation(
        "Folds",
        f"{total(increase(pool('maintenance_runs_total', kind='fold')), 'instance', 'pool')} > 0",
        "fold",
        "{{instance}} {{pool}}",
        "blue",
    ),
    Annotation(
        "Compactions",
        f"{total(increase(pool('maintenance_runs_total', kind='compact')), 'instance', 'pool')} > 0",
        "compaction",
        "{{instance}} {{pool}}",
        "purple",
    ),
    Annotation(
        "Recompressions",
        f"{total(increase(pool('maintenance_runs_total', kind='recompress')), 'instance', 'pool')} > 0",
        "recompression",
        "{{instance}} {{pool}}",
        "orange",
    ),
    Annotation(
        "Starts",
        f"{server('process_start_time_seconds')} * 1000",
        "server started",
        "{{instance}}",
        "green",
        value_is_time=True,
    ),
)
