"""What `nbdzram top` shows: one screen of text, from frames. No terminal is touched here.

who it is, for how long, how many clients
what is stored, in how much memory
a bar a pool: objects, fragmentation, metadata, what folding keeps out, up to the limit
traffic, with a line of the last minutes
exports, the busiest first
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from nbdzram.engine.stats import DiskUsage, PoolStats
from nbdzram.rates import Rates
from nbdzram.status import ExportStatus, PoolStatus, ServerStatus
from nbdzram.units import counted, format_seconds, format_size

HISTORY = 60  # samples that a sparkline remembers
BAR_BYTES = 1 << 20  # the least a pool's bar stands for: the tables of an empty pool do not fill it
KEPT_BYTES = 192 << 10
"""A full pool has so much left at most: 64 KiB are kept for making room, and figures for strangers are rounded."""
NAMED_WIDTH = 16  # of a pool's name in a line that has more to say
MAX_POOLS = 4  # bars; the rest is counted in one line
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
    lines = [*_head(frame, width), Text(), *_pools(frame, width), Text(), *_traffic(frame, width), Text()]
    room = max(height - len(lines) - 1 - keys, 2)
    lines += _exports(frame, width, room)
    if keys:
        lines += [Text() for _ in range(height - 1 - len(lines))]
        lines.append(_footer(frame, width))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis" if _fits("…", encoding) else "crop"
        line.plain = "".join(one if _fits(one, encoding) else PLAIN.get(one, "?") for one in line.plain)
    return Group(*lines)


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
    full = next((pool.name for pool in status.pools if _is_full(pool.stats)), None)
    if status.draining:
        state = ("draining", "yellow")
    elif status.starting:
        state = ("starting", "yellow")
    elif status.headroom is not None and status.headroom.short:
        state = ("memory is short", "red")
    elif full is not None:
        state = (f"pool {full[:NAMED_WIDTH]} is full", "red")
    else:
        state = ("serving", "green")
    clients = counted(status.connections, "connection")
    told = f"  up {format_seconds(status.uptime_seconds)}  {clients}"
    left = Text.assemble((f"nbdzram {status.version}", "bold"), "  ", state, told)
    yield _aligned(left, Text(status.uris[0] if status.uris else "", "dim"), width)
    stats = [pool.stats for pool in status.pools]
    stored = sum(one.orig_data_size for one in stats)
    taken = sum(one.memory_used for one in stats)
    yield Text.assemble(
        "stored ",
        (format_size(stored), "bold"),
        "  in memory ",
        (format_size(taken), "bold"),
        "  ratio ",
        (f"{stored / taken:.2f}" if stored and taken else "-", "bold"),
        "  folded away ",
        (format_size(sum(one.shared_bytes for one in stats)), "bold"),
    )


def _is_full(stats: PoolStats) -> bool:
    """As the status page has it."""
    room = stats.mem_limit - stats.memory_used
    return stats.mem_limit > 0 and (room <= stats.mem_limit * 0.005 or room <= min(stats.mem_limit * 0.2, KEPT_BYTES))


def _pools(frame: Frame, width: int) -> Iterator[Text]:
    pools = frame.status.pools
    shown = pools if len(pools) <= MAX_POOLS else pools[: MAX_POOLS - 1]
    name_width = min(max(cell_len(pool.name) for pool in pools), 16)
    for pool in shown:
        yield _bar(pool, name_width, width)
    if len(shown) < len(pools):
        yield Text(f"and {len(pools) - len(shown)} pools more", "dim")
    legend = Text()
    for name, mark, colour, size in PARTS:
        legend.append(mark, colour).append(f" {name} ")
        legend.append(f"{format_size(sum(size(pool.stats) for pool in pools))}  ", "bold")
    yield legend


def _bar(pool: PoolStatus, name_width: int, width: int) -> Text:
    stats = pool.stats
    sizes = [size(stats) for *_, size in PARTS]
    if stats.mem_limit:
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
    name = _fitted(export.name, name_width - 1)
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
    queues = [pool.maintenance.queue for pool in frame.status.pools if pool.maintenance.queue]
    work = Text()
    for run, *_ in queues[:1]:
        told = "paused" if run.state == "paused" else f"{min(100 * run.done / max(run.total, 1), 100):.0f} %"
        left = f", {format_seconds(run.seconds_left)} left" if run.seconds_left is not None else ""
        waiting = sum(len(queue) - 1 for queue in queues)
        waits = f", {waiting} waiting" if waiting else ""
        work = Text(f"{run.kind} of {run.pool}: {told}{left}{waits}", "yellow")
    keys = Text.assemble(("q", "bold"), " quit   ", ("s", "bold"), f" sort: {frame.sort}")
    return _aligned(keys, work, width)


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
