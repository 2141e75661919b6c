"""What `nbdzram top` shows: one screen of text, from frames. No terminal is touched here.

who it is, what is wrong, for how long, how many clients
what is stored, in how much memory, and writes that were refused
a bar a pool: objects, fragmentation, metadata, what folding keeps out, up to the limit
traffic, with a line of the last minutes
exports, the busiest first
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from nbdzram.cli.columns import legible
from nbdzram.engine.stats import DiskUsage, PoolStats
from nbdzram.rates import Rates
from nbdzram.status import ExportStatus, PoolStatus, ServerStatus
from nbdzram.thresholds import (
    CERTIFICATE_DAYS,
    CROWDED,
    FULL_LEAST_SHARE,
    FULL_LEFT,
    KEPT_BYTES,
    LATE_INTERVALS,
    LATE_SECONDS,
    NEAR_LIMIT,
    OVER_LIMIT,
    ROOM_LEAST,
)
from nbdzram.units import counted, format_seconds, format_size

HISTORY = 60  # samples that a sparkline remembers
BAR_BYTES = 1 << 20  # the least a pool's bar stands for: the tables of an empty pool do not fill it
NAMED_WIDTH = 16  # of a pool's name in a line that has more to say
TIMES_FROM = 10  # above a limit: "1594 % of it" is no way of being full
MAX_POOLS = 4  # bars; the rest is counted in one line
LEAST_ROWS = 4  # of exports, with their heading: for them a low screen gives up what it can do without
WIDTHS = {"SIZE": 7, "STORED": 8, "RATIO": 6, "SHARED": 7, "READ/s": 8, "WRITE/s": 8, "IOPS": 6, "P99": 7, "CONN": 5}
"""The columns behind the name. 80 have room for all; in fewer, those go first that change least."""
LEAVING = ("SIZE", "SHARED", "CONN", "RATIO", "P99", "IOPS")
LEAST_NAME_WIDTH = 80 - sum(WIDTHS.values())
BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN = dict(zip(BLOCKS + "░·µ…", " .:-=+*%#/.u~", strict=True))
"""What stands for them where the terminal's encoding has none of them."""
Part = tuple[str, str, str, Callable[[PoolStats], int]]
PARTS: tuple[Part, ...] = (
    ("objects", "█", "blue", lambda stats: stats.compr_data_size),
    ("fragmentation", "█", "yellow", lambda stats: max(stats.mem_used_total - stats.compr_data_size, 0)),
    ("metadata", "█", "magenta", lambda stats: stats.metadata),
    ("folded away", "░", "green", lambda stats: stats.shared_bytes),
)
SHORT_NAMES = {"fragmentation": "frag", "metadata": "meta", "folded away": "folded"}  # in a narrow terminal
SORTS: dict[str, Callable[[ExportStatus, Rates], tuple[float, ...]]] = {
    "traffic": lambda export, rates: (rates.read_bytes + rates.write_bytes, rates.requests, export.stored_bytes),
    "requests": lambda export, rates: (rates.requests, export.stored_bytes),
    "stored": lambda export, _: (export.stored_bytes,),
    "clients": lambda export, rates: (export.connections, rates.requests),
    "name": lambda _, __: (),
}
"""Orders of the exports, the highest first; equal ones stay in the server's order."""


@dataclass(slots=True)
class Frame:
    """What is shown at one moment, and what came before it."""

    status: ServerStatus
    all_rates: Rates = field(default_factory=Rates)
    rates: dict[str, Rates] = field(default_factory=dict)
    usage: dict[str, DiskUsage] = field(default_factory=dict)
    history: deque[Rates] = field(default_factory=lambda: deque(maxlen=HISTORY))
    sort: str = "traffic"


def screen(frame: Frame, width: int, height: int, *, keys: bool, encoding: str = "utf-8") -> Group:
    """Everything, in `width` columns and `height` lines. `keys`: tell which keys do something."""
    lines = _above(frame, width, height - keys - LEAST_ROWS)
    room = max(height - len(lines) - 1 - keys, 2)
    lines += _exports(frame, width, room)
    if keys:
        lines += [Text() for _ in range(height - 1 - len(lines))]
        lines.append(_footer(frame, width))
    elif work := next((told for told in _work(frame.status) if len(told) <= width), None):
        lines += [Text(), Text(work, "yellow")]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis" if _fits("…", encoding) else "crop"
        line.plain = "".join(one if _fits(one, encoding) else PLAIN.get(one, "?") for one in line.plain)
    return Group(*lines)


def _above(frame: Frame, width: int, room: int) -> list[Text]:
    """What stands above the exports. Where it would leave them no room blank lines go, then traffic, then pools."""
    parts = [list(_head(frame, width)), list(_pools(frame, width)), list(_traffic(frame, width))]
    lines = [line for part in parts for line in (*part, Text())]
    if len(lines) > room:
        lines = [line for part in parts for line in part]
    while len(lines) > room and len(parts) > 1:
        del parts[-1]
        lines = [line for part in parts for line in part]
    return lines


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def duration(seconds: float) -> str:
    """Short: 34 µs, 1.2 ms, 3 s; a dash for none."""
    if seconds <= 0:
        return "-"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{1 if seconds < 0.00995 else 0}f} ms"
    return f"{seconds:.1f} s"


def _head(frame: Frame, width: int) -> Iterator[Text]:
    status = frame.status
    state = next(_troubles(status), ("serving", "green"))
    clients = counted(status.connections, "connection")
    told = f"  up {format_seconds(status.uptime_seconds)}  {clients}"
    left = Text.assemble((f"nbdzram {status.version}", "bold"), "  ", state, told)
    yield _aligned(left, Text(status.uris[0] if status.uris else "", "dim"), width)
    stats = [pool.stats for pool in status.pools]
    stored = sum(one.orig_data_size for one in stats)
    taken = sum(one.memory_used for one in stats)
    refused = sum(one.failed_writes for one in stats)
    parts: dict[str, tuple[str | tuple[str, str], ...]] = {
        "stored": ("stored ", (format_size(stored), "bold")),
        "taken": ("  in memory ", (format_size(taken), "bold")),
        "ratio": ("  ratio ", (f"{stored / taken:.2f}" if stored and taken else "-", "bold")),
        "folded": ("  folded away ", (format_size(sum(one.shared_bytes for one in stats)), "bold")),
        "refused": ((f"  refused {counted(refused, 'write')}" if refused else "", "red"),),
    }
    leaving = iter(("folded", "ratio", "taken"))
    while (line := Text.assemble(*chain.from_iterable(parts.values()))).cell_len > width and (
        gone := next(leaving, None)
    ):
        del parts[gone]
    yield line


def _troubles(status: ServerStatus) -> Iterator[tuple[str, str]]:
    """What the first line is to say, and in which colour: the worst first. The status page tells each of them too."""
    full = next((pool.name for pool in status.pools if _is_full(pool.stats)), None)
    over = next((pool.name for pool in status.pools if _share(pool.stats) > OVER_LIMIT), None)
    near = next((pool.name for pool in status.pools if _share(pool.stats) >= NEAR_LIMIT), None)
    ends = _certificate_seconds(status)
    crowd = status.connections / status.connections_limit
    room = status.state_dir_free_bytes / status.state_dir_size_bytes if status.state_dir_size_bytes else 1
    rotten = next((pool.name for pool in status.pools if _is_rotten(pool)), None)
    journal = status.journal
    held_back = journal.held_back if journal is not None else ()
    left_behind = status.checkpoint.held_back if status.checkpoint is not None else ()
    table = (
        (status.draining, "draining", "yellow"),
        (status.starting, "starting", "yellow"),
        (status.headroom is not None and status.headroom.short, "memory is short", "red"),
        (rotten is not None, f"pool {(rotten or '')[:NAMED_WIDTH]} has rotten blocks", "red"),
        (journal is not None and bool(journal.trouble) and not journal.usable, "FLUSH fails", "red"),
        (journal is not None and bool(journal.trouble) and journal.usable, "FLUSH waits for a disk", "red"),
        (bool(held_back), f"FLUSH of {(*held_back, '')[0][:NAMED_WIDTH]} fails", "red"),
        (over is not None, f"pool {(over or '')[:NAMED_WIDTH]} is above its limit", "red"),
        (full is not None, f"pool {(full or '')[:NAMED_WIDTH]} is full", "red"),
        (ends is not None and ends <= 0, "the certificate has expired", "red"),
        (crowd >= 1, "connections at their limit", "red"),
        (_checkpoint_is_late(status), "the newest checkpoint is old", "red"),
        (bool(left_behind), f"checkpoints lack {(*left_behind, '')[0][:NAMED_WIDTH]}", "red"),
        (room < ROOM_LEAST / 5, "the state directory is full", "red"),
        (journal is not None and not journal.usable, "FLUSH waits for a checkpoint", "yellow"),
        (status.checkpoint is not None and status.checkpoint.damaged_files > 0, "checkpoints were damaged", "yellow"),
        (near is not None, f"pool {(near or '')[:NAMED_WIDTH]} is nearly full", "yellow"),
        (
            ends is not None and ends < CERTIFICATE_DAYS * 86400,
            f"certificate ends in {format_seconds(ends or 0)}",
            "yellow",
        ),
        (not status.tls_files_usable, "TLS files cannot be used", "yellow"),
        (crowd >= CROWDED, "connections near their limit", "yellow"),
        (room < ROOM_LEAST, "state directory nearly full", "yellow"),
    )
    return ((told, colour) for holds, told, colour in table if holds)


def _is_rotten(pool: PoolStatus) -> bool:
    """The last look for rot found some, or a read did and nobody has looked further."""
    return pool.scrub.rotten_blocks > 0 or (pool.scrub.finished_at is None and pool.stats.blocks_rotten > 0)


def _checkpoint_is_late(status: ServerStatus) -> bool:
    if status.checkpoint is None:
        return False
    moment = status.checkpoint.moment
    if moment is None:
        if not status.exports:  # of nothing none is taken
            return False
        moment = status.started_at
    age = status.started_at + status.uptime_seconds - moment
    return age > LATE_INTERVALS * status.checkpoint.interval_seconds + LATE_SECONDS


def _certificate_seconds(status: ServerStatus) -> float | None:
    """How long it is still good; None: there is none."""
    if status.certificate_expires_at is None:
        return None
    return status.certificate_expires_at - status.started_at - status.uptime_seconds


def _share(stats: PoolStats) -> float:
    return stats.memory_used / stats.mem_limit if stats.mem_limit else 0.0


def _is_full(stats: PoolStats) -> bool:
    """As the status page has it."""
    room = stats.mem_limit - stats.memory_used
    least = max(stats.mem_limit * FULL_LEFT, min(stats.mem_limit * (1 - FULL_LEAST_SHARE), KEPT_BYTES))
    return stats.mem_limit > 0 and room <= least


def _pools(frame: Frame, width: int) -> Iterator[Text]:
    pools = frame.status.pools
    shown = list(pools)
    if len(pools) > MAX_POOLS:  # those near their limits, then the largest; in the server's order
        foremost = sorted(
            pools, key=lambda pool: (_share(pool.stats) >= NEAR_LIMIT, pool.stats.memory_used), reverse=True
        )
        shown = [pool for pool in pools if pool in foremost[: MAX_POOLS - 1]]
    name_width = min(max(cell_len(pool.name) for pool in pools), 16)
    for pool in shown:
        yield _bar(pool, name_width, width)
    if len(shown) < len(pools):
        yield Text(f"and {counted(len(pools) - len(shown), 'pool')} more", "dim")
    legend = _legend(pools, {})
    yield legend if legend.cell_len <= width else _legend(pools, SHORT_NAMES)


def _legend(pools: Sequence[PoolStatus], names: Mapping[str, str]) -> Text:
    legend = Text()
    for name, mark, colour, size in PARTS:
        legend.append("  " if legend else "").append(mark, colour).append(f" {names.get(name, name)} ")
        legend.append(format_size(sum(size(pool.stats) for pool in pools)), "bold")
    return legend


def _bar(pool: PoolStatus, name_width: int, width: int) -> Text:
    stats = pool.stats
    sizes = [size(stats) for *_, size in PARTS]
    if stats.memory_used >= TIMES_FROM * stats.mem_limit > 0:
        told = f" {stats.memory_used / stats.mem_limit:.1f} times {format_size(stats.mem_limit)}"
    elif stats.mem_limit:
        told = f" {100 * stats.memory_used / stats.mem_limit:.0f} % of {format_size(stats.mem_limit)}"
    else:
        told = f" {format_size(stats.memory_used)}, no limit"
    length = max(width - name_width - 1 - len(told), 10)
    scale = max(sum(sizes), stats.mem_limit, BAR_BYTES)
    line = Text(set_cell_size(pool.name, name_width), "bold").append(" ")
    drawn, total = 0, 0
    for (_, mark, colour, _), size in zip(PARTS, sizes, strict=True):
        total += size
        until = round(length * total / scale)
        until = max(until, min(drawn + 1, length)) if size else until  # what is there is seen
        line.append(mark * (until - drawn), colour)
        drawn = max(until, drawn)
    return line.append("·" * (length - drawn), "dim").append(told)


def _traffic(frame: Frame, width: int) -> Iterator[Text]:
    now, past = frame.all_rates, frame.history
    spark = max(width - 48, 10)
    rows: tuple[tuple[str, str, list[float], str, str, str], ...] = (
        ("read", _rate(now.read_bytes), [r.read_bytes for r in past], "blue", "median", duration(now.median_seconds)),
        ("written", _rate(now.write_bytes), [r.write_bytes for r in past], "red", "p99", duration(now.p99_seconds)),
        ("requests", f"{now.requests:.0f}/s", [r.requests for r in past], "cyan", "loop lag", _lag(frame.status)),
    )
    for name, value, series, colour, other, figure in rows:
        line = Text(f"{name:9}").append(f"{value:>9} ", "bold").append(_spark(series, spark), colour)
        yield line.append(f"   {other:9}").append(f"{figure:>9}", "bold")


def _exports(frame: Frame, width: int, room: int) -> Iterator[Text]:
    exports = sorted(
        frame.status.exports, key=lambda e: SORTS[frame.sort](e, frame.rates.get(e.name, Rates())), reverse=True
    )
    if frame.sort == "name":
        exports.sort(key=lambda export: export.name)
    columns, leaving = dict(WIDTHS), iter(LEAVING)
    while width - sum(columns.values()) < LEAST_NAME_WIDTH and (gone := next(leaving, None)):
        del columns[gone]
    name_width = max(width - sum(columns.values()), 8)
    heading = "".join(f"{name:>{cells}}" for name, cells in columns.items())
    yield Text(f"{'EXPORT':{name_width}}{heading}", "bold reverse")
    if not exports:
        yield Text("no exports; add one with: nbdzram exports add NAME SIZE", "dim")
    shown = exports if len(exports) <= room else exports[: room - 1]
    for export in shown:
        yield _row(export, frame.rates.get(export.name, Rates()), frame.usage.get(export.name), name_width, columns)
    if len(shown) < len(exports):
        yield Text(f"and {len(exports) - len(shown)} more", "dim")


def _row(
    export: ExportStatus, rates: Rates, usage: DiskUsage | None, name_width: int, columns: Mapping[str, int]
) -> Text:
    costs = usage is not None and usage.compressed > 0
    cells = {
        "SIZE": format_size(export.size_bytes),
        "STORED": format_size(export.stored_bytes) if export.stored_bytes else "-",
        "RATIO": _times(usage.stored / usage.compressed) if usage and costs else "-",
        "SHARED": f"{100 * usage.shared / usage.compressed:.0f} %" if usage and costs else "-",
        "READ/s": _amount(rates.read_bytes),
        "WRITE/s": _amount(rates.write_bytes),
        "IOPS": f"{rates.requests:.0f}" if rates.requests else "-",
        "P99": duration(rates.p99_seconds),
        "CONN": str(export.connections) if export.connections else "-",
    }
    told = "".join(f"{cells[name]:>{width}}" for name, width in columns.items())
    name = _fitted(legible(export.name, "utf-8"), name_width - 1)
    return Text(f"{name} ", "bold" if rates.requests else "").append(told, "" if rates.requests else "dim")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def _fitted(name: str, width: int) -> str:
    """The name in exactly `width` cells; a long one loses its middle, because names differ at their ends."""
    if cell_len(name) <= width:
        return set_cell_size(name, width)
    tail = name[-((width - 1) // 2) :]
    while cell_len(tail) > (width - 1) // 2:  # wide characters
        tail = tail[1:]
    return f"{set_cell_size(name, width - 1 - cell_len(tail))}…{tail}"


def _footer(frame: Frame, width: int) -> Text:
    keys = Text.assemble(("q", "bold"), " quit   ", ("s", "bold"), f" sort: {frame.sort}")
    told = (_aligned(keys, Text(work, "yellow"), width) for work in _work(frame.status))
    return next((line for line in told if line.cell_len > keys.cell_len), keys)


def _work(status: ServerStatus) -> Iterator[str]:
    """The first run under way, in fewer and fewer words: the first that has room is shown."""
    queues = [pool.maintenance.queue for pool in status.pools if pool.maintenance.queue]
    for run, *_ in queues[:1]:
        told = "paused" if run.state == "paused" else f"{min(100 * run.done / max(run.total, 1), 100):.0f} %"
        left = f", {format_seconds(run.seconds_left)} left" if run.seconds_left is not None else ""
        waiting = sum(len(queue) - 1 for queue in queues)
        waits = f", {waiting} waiting" if waiting else ""
        yield f"{run.kind} of {run.pool}: {told}{left}{waits}"
        yield f"{run.kind} of {run.pool}: {told}{waits}"
        yield f"{run.kind}: {told}"


def _aligned(left: Text, right: Text, width: int) -> Text:
    """Both on one line, or the left one alone."""
    gap = width - left.cell_len - right.cell_len
    return left if gap < 2 else Text.assemble(left, " " * gap, right)


def _spark(series: list[float], width: int) -> str:
    shown = series[-width:]
    top = max(shown, default=0.0)
    marks = (BLOCKS[round(value / top * 8) or (1 if value else 0)] if top else " " for value in shown)
    return "".join(marks).rjust(width)


def _lag(status: ServerStatus) -> str:
    return duration(status.event_loop_lag_seconds)


def _amount(value: float) -> str:
    return format_size(int(value)) if value >= 1 else "-"


def _rate(value: float) -> str:
    return f"{format_size(int(value))}/s"
