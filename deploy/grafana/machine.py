"""Rows of the dashboard about what carries the disks: checkpoints and journal, memory of the machine, the process."""

from __future__ import annotations

from deploy.grafana.model import Kind, Panel, Query, Row, rate, server, total

PROCESS = Row(
    "Process",
    (
        Panel(
            "Processor",
            "Share of one core. Above 1 the workers of large requests and maintenance are at it.",
            "percentunit",
            (Query(rate(server("process_cpu_seconds_total")), "{{instance}}"),),
            width=6,
        ),
        Panel(
            "Resident memory",
            "Resident size of the process against what its pools account for. What lies between is the program itself "
            "and the buffers of connections.",
            "bytes",
            (
                Query(server("process_resident_memory_bytes"), "{{instance}} resident"),
                Query(
                    total(server("memory_used_bytes"), "instance"),
                    "{{instance}} accounted for",
                ),
            ),
            width=6,
        ),
        Panel(
            "Event loop lag",
            "How late the event loop woke: handshakes and commands wait as long.",
            "s",
            (Query(server("event_loop_lag_seconds"), "{{instance}}"),),
            width=6,
        ),
        Panel(
            "Open files",
            "Descriptors in use; each client takes one.",
            "short",
            (
                Query(server("process_open_fds"), "{{instance}}"),
                Query(server("process_max_fds"), "{{instance}} limit"),
            ),
            width=6,
        ),
        Panel(
            "New connections",
            "Connections accepted a second. Many without requests behind them: a health check, or clients that "
            "reconnect.",
            "cps",
            (Query(rate(server("connections_accepted_total")), "{{instance}}"),),
        ),
        Panel(
            "Uptime",
            "Time since the process started. A disk in memory is as old at most, unless it was taken over or kept.",
            "s",
            (Query(f"time() - {server('process_start_time_seconds')}", "{{instance}}"),),
            Kind.STAT,
        ),
        Panel(
            "Versions",
            "Servers by the version they run.",
            "short",
            (Query(total(server("build_info"), "version", "liblz4"), "nbdzram {{version}}, liblz4 {{liblz4}}"),),
            Kind.NAMES,
        ),
        Panel(
            "Threads that serve clients",
            "Share of time at work.",
            "percentunit",
            (Query(rate(server("io_thread_busy_seconds_total")), "{{instance}} thread {{thread}}"),),
            width=8,
        ),
        Panel(
            "Longest turn",
            "How long a client may wait for another one of its thread.",
            "s",
            (Query(server("io_thread_longest_turn_seconds"), "{{instance}} thread {{thread}}"),),
            width=8,
        ),
        Panel(
            "Clients a thread",
            "Newcomers go to the thread with the fewest.",
            "short",
            (Query(server("io_thread_clients"), "{{instance}} thread {{thread}}"),),
            width=8,
        ),
    ),
)  # fmt: skip

AGE = (
    f"(time() - {server('checkpoint_timestamp_seconds')} or time() - ({server('process_start_time_seconds')} "
    f"and on (job, instance) {server('export_size_bytes')}))"
)
LATE = f"{AGE} > 5 * {server('checkpoint_interval_seconds')} + 60"

CHECKPOINTS = Row(
    "Checkpoints",
    (
        Panel(
            "Age of the newest checkpoint",
            "After a power failure the disks would be those of so long ago. The line is the interval that is wanted.",
            "s",
            (
                Query(f"time() - {server('checkpoint_timestamp_seconds')}", "{{instance}}"),
                Query(server("checkpoint_interval_seconds"), "{{instance}} interval"),
            ),
            empty="no checkpoints are taken",
        ),
        Panel(
            "What a checkpoint takes",
            "Time from the moment of the last one to its file being durable, how often one failed, and how many exports"
            " the newest has as they were before, as they cannot be read; and files that a start could not use.",
            "s",
            (
                Query(server("checkpoint_duration_seconds"), "{{instance}}"),
                Query(server("checkpoint_held_back_exports"), "{{instance}} held back", "short"),
                Query(server("checkpoint_damaged_files"), "{{instance}} damaged files", "short"),
                Query(rate(server("checkpoint_failures_total")), "{{instance}} failures a second", "cps"),
            ),
            empty="no checkpoints are taken",
        ),
        Panel(
            "Size of a checkpoint",
            "Size of the last file: what changed since the one before, or all of it where a chain begins.",
            "bytes",
            (Query(server("checkpoint_size_bytes"), "{{instance}}"),),
            empty="no checkpoints are taken",
        ),
        Panel(
            "What a flush waits for",
            "Time that the journal's last group took, where durability is flush; 0 usable: FLUSH waits or fails."
            " Of exports that are held back it fails.",
            "s",
            (
                Query(server("journal_group_duration_seconds"), "{{instance}}"),
                Query(server("journal_usable"), "{{instance}} usable", "short"),
                Query(server("journal_held_back_exports"), "{{instance}} held back", "short"),
                Query(rate(server("journal_failures_total")), "{{instance}} failures a second", "cps"),
            ),
            empty="no pool's FLUSH waits for a disk",
        ),
        Panel(
            "Groups of the journal",
            "Groups a second; each answers all who waited.",
            "ops",
            (Query(rate(server("journal_groups_total")), "{{instance}}"),),
            empty="no pool's FLUSH waits for a disk",
        ),
        Panel(
            "Bytes of the journal",
            "Bytes a second that FLUSH brings to the disk, and what a start would read behind the newest checkpoint.",
            "bytes",
            (
                Query(rate(server("journal_written_bytes_total")), "{{instance}} a second", "Bps"),
                Query(server("journal_size_bytes"), "{{instance}} size"),
            ),
            empty="no pool's FLUSH waits for a disk",
        ),
    ),
)  # fmt: skip

HEADROOM = Row(
    "Memory of the machine",
    (
        Panel(
            "What is left of memory",
            "Of the cgroup or machine that has the least left; page cache that can be dropped is left. Pools take all "
            "but the reserve.",
            "bytes",
            (
                Query(server("headroom_free_bytes"), "{{instance}} left"),
                Query(server("headroom_reserve_bytes"), "{{instance}} reserve"),
                Query(server("headroom_limit_bytes"), "{{instance}} limit"),
            ),
            empty="nobody looks: limits.keep_free is off, or memory is not told",
        ),
        Panel(
            "Memory is short",
            "While it is 1, writes that need more memory are refused, and pools fold and compact.",
            "short",
            (Query(server("memory_short"), "{{instance}}"),),
            empty="nobody looks: limits.keep_free is off, or memory is not told",
        ),
        Panel(
            "Shortages",
            "How often memory became short: often, and it is too little for what is written.",
            "cps",
            (Query(rate(server("memory_shortages_total")), "{{instance}}"),),
            empty="nobody looks: limits.keep_free is off, or memory is not told",
        ),
    ),
)  # fmt: skip
