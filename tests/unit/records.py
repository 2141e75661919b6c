"""Records as a busy server would give them, for tests of what shows or publishes them."""

from __future__ import annotations

from dataclasses import replace

from nbdzram.bounds import Bounds
from nbdzram.engine.stats import DiskUsage, PoolStats
from nbdzram.status import (
    CheckpointStatus,
    ClientStatus,
    ExportStatus,
    HeadroomStatus,
    JournalStatus,
    MaintenanceStatus,
    OperationStatus,
    PoolStatus,
    RunReport,
    RunStatus,
    RunSummary,
    RunTotals,
    ScrubStatus,
    ServerStatus,
    StreamStatus,
    ThreadStatus,
)

MIB = 1 << 20

POOL_STATS = PoolStats(
    orig_data_size=400 * MIB,
    compr_data_size=100 * MIB,
    mem_used_total=110 * MIB,
    mem_limit=512 * MIB,
    mem_used_max=120 * MIB,
    same_pages=1234,
    pages_compacted=56,
    huge_pages=78,
    huge_pages_since=90,
    pages_folded=321,
    metadata=3 * MIB,
    objects=50_000,
    handles=70_000,
    shared_objects=9_000,
    shared_bytes=40 * MIB,
    fold_pending=17,
    objects_folded=20_000,
    inline_folded=11,
    objects_moved=444,
    objects_recompressed=0,
    recompress_untried=80 * MIB,
    compr_by_codec={"raw": 10 * MIB, "lz4": 90 * MIB},
    zspages=7_000,
    failed_writes=2,
    blocks_rotten=5,
)

READ = OperationStatus(
    requests=10, bytes=40_960, errors={"EINVAL": 1}, latency_counts=(4, 5, 1), latency_sum_seconds=0.001
)

EXPORT = ExportStatus(
    name="disk",
    pool="default",
    size_bytes=1 << 30,
    read_only=False,
    description="the first disk",
    admits="listed",
    allow_addresses=("10.0.0.0/8",),
    allow_certificates=(),
    private=False,
    bounds=Bounds(quota_bytes=500 * MIB, iops=500, bandwidth_bytes=50 * MIB),
    stored_bytes=400 * MIB,
    same_filled_bytes=1234 * 4096,
    connections=2,
    failed_reads=0,
    failed_writes=3,
    invalid_io=1,
    notify_free=99,
    throttled_requests=12,
    throttled_seconds=1.5,
    operations={"read": READ},
)

CLIENT = ClientStatus(
    number=7,
    peer="192.0.2.7:5555",
    certificate_names=("vm1", "vm1.example"),
    export="disk",
    read_only=False,
    since=1.7e9,
    requests=1234,
    in_flight=3,
    idle_seconds=0.5,
)

USAGE = DiskUsage(
    stored=400 * MIB,
    same_filled=1234 * 4096,
    compressed=120 * MIB,
    unique=90 * MIB,
    shared=30 * MIB,
    huge=78 * 4096,
)

STREAM = StreamStatus(
    stream="00" * 16,
    way="received",
    state="kept",
    exports=("disk",),
    records=7,
    stream_bytes=4096,
    seconds_left=60.0,
    token=f"{'00' * 16}-7-{'00' * 8}",
)

RUNNING = RunStatus(
    number=7,
    kind="recompress",
    pool="default",
    state="running",
    reason="asked",
    dry_run=False,
    cpu_percent=100,
    asked_at=1.7e9,
    started_at=1.7e9,
    finished_at=None,
    seconds=60.0,
    done=310,
    total=1000,
    seconds_left=125.0,
    result={},
    error=None,
)
WAITING = replace(
    RUNNING, number=8, kind="fold", state="waiting", started_at=None, seconds=0.0, done=0, total=0, seconds_left=None
)

MAINTENANCE = MaintenanceStatus(
    running=None,
    done=0,
    total=0,
    totals={"fold": RunTotals(runs=3, failures=0, seconds=1.5, cpu_seconds=0.5, bytes_freed=5 * MIB)},
    decisions={"fold": {"not_worth_it": 7}},
    next_allowed_seconds={},
    recent=(RunSummary("fold", "done", "asked", 1.7e9, 0.25, 4096, {"objects_merged": 100}),),
    queue=(),
)

SERVER = ServerStatus(
    version="0.1.0",
    pid=42,
    started_at=1.7e9,
    uptime_seconds=60.0,
    uris=("nbd://127.0.0.1:10809",),
    draining=False,
    connections=2,
    connections_total=5,
    handshake_failures={"timeout": 1},
    protocol_errors=4,
    connections_limit=1024,
    tls_files_usable=True,
    certificate_expires_at=1.8e9,
    state_dir_size_bytes=1024 * MIB,
    state_dir_free_bytes=300 * MIB,
    event_loop_lag_seconds=0.0004,
    headroom=HeadroomStatus(
        whose="the cgroup /sys/fs/cgroup/a",
        limit_bytes=512 * MIB,
        free_bytes=300 * MIB,
        reserve_bytes=48 * MIB,
        short=False,
        shortages=4,
    ),
    threads=(ThreadStatus(0, 1, 0.5, 0.0001), ThreadStatus(1, 2, 12.25, 0.0007)),
    latency_bounds_seconds=(0.0001, 0.001),
    pools=(
        PoolStatus(
            name="default",
            path=None,
            dedup="fold",
            tells_sharing=True,
            verify=True,
            stats=POOL_STATS,
            scrub=ScrubStatus(objects=9000, blocks=12000, rotten_objects=1, rotten_blocks=2, finished_at=1.75e9),
            maintenance=MAINTENANCE,
        ),
    ),
    exports=(EXPORT,),
    checkpoint=CheckpointStatus(moment=1.7e9, interval_seconds=60.0, seconds=0.5, stream_bytes=3 * MIB, failures=1),
    journal=JournalStatus(
        pools=("default",),
        usable=True,
        trouble="",
        groups=7,
        group_bytes=5 * MIB,
        segment_bytes=MIB,
        seconds=0.003,
        failures=2,
    ),
)

REPORT = RunReport(
    kind="fold",
    pool="default",
    dry_run=False,
    reason="asked",
    seconds=0.25,
    cpu_seconds=0.2,
    result={"objects_merged": 100, "bytes_freed": 300_000, "pages_returned": 70, "comparisons": 100},
    before=POOL_STATS,
    after=replace(POOL_STATS, mem_used_total=109 * MIB, compr_data_size=99 * MIB),
)

OTHER_EXPORT = replace(
    EXPORT,
    name="other",
    pool="fast",
    size_bytes=3 << 30,
    read_only=True,
    description="the other disk",
    admits="everyone",
    allow_addresses=(),
    private=True,
    bounds=Bounds(),
    stored_bytes=17 * MIB,
    same_filled_bytes=19 * 4096,
    connections=23,
    failed_reads=29,
    failed_writes=31,
    invalid_io=37,
    notify_free=41,
    throttled_requests=0,
    throttled_seconds=0.0,
    operations={
        "read": OperationStatus(43, 47 * MIB, {}, (30, 10, 3), 0.053),
        "write": OperationStatus(59, 61 * MIB, {"ENOSPC": 67}, (0, 50, 9), 0.071),
    },
)
OTHER_POOL = replace(
    SERVER.pools[0],
    name="fast",
    path="/var/lib/nbdzram/fast.arena",
    dedup="inline",
    tells_sharing=False,
    verify=False,
    stats=PoolStats(
        orig_data_size=73 * MIB,
        compr_data_size=31 * MIB,
        mem_used_total=37 * MIB,
        mem_limit=0,
        mem_used_max=41 * MIB,
        same_pages=79,
        pages_compacted=83,
        huge_pages=89,
        huge_pages_since=97,
        pages_folded=101,
        metadata=5 * MIB,
        objects=103,
        handles=107,
        shared_objects=109,
        shared_bytes=7 * MIB,
        fold_pending=113,
        objects_folded=127,
        inline_folded=131,
        objects_moved=137,
        objects_recompressed=139,
        recompress_untried=11 * MIB,
        compr_by_codec={"lz4": 13 * MIB, "zstd": 18 * MIB},
        zspages=149,
        failed_writes=0,
        blocks_rotten=0,
    ),
    scrub=ScrubStatus(objects=151, blocks=157, rotten_objects=3, rotten_blocks=6, finished_at=1.76e9),
    maintenance=MaintenanceStatus(
        running="recompress",
        done=310,
        total=1000,
        totals={
            "fold": RunTotals(runs=163, failures=167, seconds=173.5, cpu_seconds=179.5, bytes_freed=181 * MIB),
            "recompress": RunTotals(runs=191, failures=193, seconds=197.5, cpu_seconds=199.5, bytes_freed=211 * MIB),
        },
        decisions={"fold": {"not_worth_it": 223, "interval": 227}, "recompress": {"interval": 229}},
        next_allowed_seconds={"fold": 233.5},
        recent=(RunSummary("recompress", "failed", "interval", 1.71e9, 0.75, 12 * MIB, {"objects_recompressed": 320}),),
        queue=(RUNNING, WAITING),
    ),
)
TWO_OF_EACH = replace(SERVER, pools=(*SERVER.pools, OTHER_POOL), exports=(EXPORT, OTHER_EXPORT))
"""A server in which no figure is another one's: what is handed on wrongly shows."""
