"""`nbdzram stat`: pools and exports in zramctl's columns, or the kernel's mm_stat and io_stat lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import click

from nbdzram.cli.columns import Cell, Column, choose, render, screen_width
from nbdzram.cli.common import (
    connect,
    control_option,
    export_names,
    json_option,
    limits_of,
    pool_names,
    require_export,
    warn_of_a_start,
)
from nbdzram.cli.numbers import SECONDS
from nbdzram.control.client import ControlClient
from nbdzram.engine.stats import DiskUsage, PoolStats
from nbdzram.errors import ConfigError, NoSuchExport
from nbdzram.status import ExportFigures, Holdings, PoolFigures, to_json
from nbdzram.units import format_size, said

if TYPE_CHECKING:
    from nbdzram.status import Account, ExportStatus

Whole = TypeVar("Whole", Holdings, "Account")
DEFAULT_COLUMNS = "NAME,TYPE,DISKSIZE,DATA,COMPR,UNIQUE,TOTAL,MEM-LIMIT,SAVED,CLIENTS"


class Line(NamedTuple):
    """One row: a pool, or an export in it."""

    pool: PoolFigures
    export: ExportFigures | None
    exports: Sequence[ExportFigures]  # of the pool
    usage: Mapping[str, DiskUsage]  # by export; empty if no column asks for it


def _pool(cell: Callable[[PoolStats], Cell]) -> Callable[[Line], Cell]:
    """A cell that only a pool's row has."""
    return lambda line: cell(line.pool.stats) if line.export is None else None


def _sum(cell: Callable[[ExportFigures], int]) -> Callable[[Line], Cell]:
    """A cell that a pool's row sums over its exports."""
    return lambda line: cell(line.export) if line.export else sum(cell(export) for export in line.exports)


def _compressed(line: Line) -> Cell:
    """A pool counts each object once, an export once a block."""
    if line.export is None:
        return line.pool.stats.compr_data_size
    return _cost(line, lambda usage: usage.compressed)


def _unique(line: Line) -> Cell:
    if line.export is None:
        return sum(usage.unique for usage in _costs(line))
    return _cost(line, lambda usage: usage.unique)


def _shared(line: Line) -> Cell:
    """A pool's objects that several exports hold, counted once."""
    if line.export is None:
        return max(line.pool.stats.compr_data_size - sum(usage.unique for usage in _costs(line)), 0)
    return _cost(line, lambda usage: usage.shared)


def _cost(line: Line, cell: Callable[[DiskUsage], int]) -> Cell:
    assert line.export is not None
    usage = line.usage.get(line.export.name)
    return None if usage is None else cell(usage)


def _costs(line: Line) -> Iterator[DiskUsage]:
    return (line.usage[export.name] for export in line.exports if export.name in line.usage)


def _saved(line: Line) -> Cell:
    """Nothing where nothing is stored: an empty pool's tables are no loss that an operator should look into."""
    stats = line.pool.stats
    return stats.saved if line.export is None and stats.orig_data_size else None


def _requests(name: str) -> Callable[[ExportFigures], int]:
    def cell(export: ExportFigures) -> int:
        operations = cast("ExportStatus", export).operations  # as COUNTED asks for
        return operations[name].requests if name in operations else 0

    return cell


COLUMNS: list[Column[Line]] = [
    Column("NAME", "pool, or export in it", lambda line: line.export.name if line.export else line.pool.name),
    Column(
        "TYPE",
        "pool, disk, or disk-ro: a snapshot, or another that clients may only read",
        lambda line: _kind(line.export),
    ),
    Column("POOL", "the pool", lambda line: line.pool.name),
    Column("DISKSIZE", "size that clients see", _sum(lambda export: export.size_bytes), True),
    Column("DATA", "uncompressed size of stored blocks", _sum(lambda export: export.stored_bytes), True),
    Column(
        "QUOTA",
        "most DATA that an export may have",
        lambda line: line.export.bounds.quota_bytes if line.export else None,
        True,
        zero="none",
    ),
    Column("COMPR", "compressed size: of a pool's distinct objects, of an export's blocks", _compressed, True),
    Column(
        "UNIQUE",
        "compressed size of objects that one export alone holds: what removing it frees at once",
        _unique,
        True,
    ),
    Column(
        "SHARED", "compressed size of objects that several exports hold; an export's: COMPR - UNIQUE", _shared, True
    ),
    Column(
        "ALGORITHM",
        "the compressors in use",
        _pool(lambda stats: "+".join(sorted(name for name, size in stats.compr_by_codec.items() if size))),
    ),
    Column("ZERO-PAGES", "same-filled blocks", _sum(lambda export: export.same_filled_bytes // 4096)),
    Column(
        "TOTAL", "memory of stored objects, fragmentation included", _pool(lambda stats: stats.mem_used_total), True
    ),
    Column("MEM-LIMIT", "most memory, metadata included", _pool(lambda stats: stats.mem_limit), True, zero="none"),
    Column("MEM-USED", "highest TOTAL so far", _pool(lambda stats: stats.mem_used_max), True),
    Column("MIGRATED", "objects moved by compaction", _pool(lambda stats: stats.objects_moved)),
    Column("HUGE", "blocks stored raw", _pool(lambda stats: stats.huge_pages)),
    Column(
        "FOLDED",
        "compressed bytes that shared objects save; tables that clones share save more",
        _pool(lambda stats: stats.shared_bytes),
        True,
    ),
    Column(
        "FRAG",
        "memory beside the objects in their pages",
        _pool(lambda stats: stats.mem_used_total - stats.compr_data_size),
        True,
    ),
    Column("META", "memory of tables and indexes", _pool(lambda stats: stats.metadata), True),
    Column(
        "SAVED", "DATA less TOTAL less META; below zero where tables take more than compression spares", _saved, True
    ),
    Column("OBJECTS", "distinct objects", _pool(lambda stats: stats.objects)),
    Column("HANDLES", "handles on them", _pool(lambda stats: stats.handles)),
    Column("CLIENTS", "connections", _sum(lambda export: export.connections)),
    Column("READS", "read requests", _sum(_requests("read"))),
    Column("WRITES", "write requests", _sum(_requests("write"))),
    Column("LIMITS", "requests and bytes a second", lambda line: limits_of(line.export) if line.export else ""),
    Column("THROTTLED", "requests that waited for that", _sum(lambda export: export.throttled_requests)),
    Column("DESCRIPTION", "what clients are told", lambda line: line.export.description if line.export else ""),
]
WALKED = {"COMPR", "UNIQUE", "SHARED"}
"""Columns that need a walk over the block tables, about 15 ms a stored GiB."""
COUNTED = {"READS", "WRITES"}
"""Columns of what clients asked for, which is most of what is told of an export: others do without."""


def column_lists(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """For a shell's completion: what is typed already, and each column that may come next."""
    *named, begun = incomplete.split(",")
    known = {name.strip().upper() for name in named}
    before = "".join(f"{name}," for name in named)
    return [
        before + column.heading
        for column in COLUMNS
        if column.heading.startswith(begun.upper()) and column.heading not in known
    ]


@click.command(
    "stat",
    epilog="\b\nExamples:\n  nbdzram stat\n  nbdzram stat -b -n --raw -o NAME,DATA disk\n"
    "  nbdzram stat --memory\n  nbdzram stat --mm-stat",
)
@click.argument("exports", metavar="[EXPORT]...", nargs=-1, shell_complete=export_names)
@click.option(
    "-o",
    "--output",
    metavar="LIST",
    shell_complete=column_lists,
    help=f"Columns to print, separated by commas; --columns explains them.  [default: {DEFAULT_COLUMNS}]",
)
@click.option("--output-all", is_flag=True, help="Print every column.")
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Print sizes in bytes.")
@click.option("-n", "--noheadings", is_flag=True, help="Print no headings.")
@click.option("--raw", is_flag=True, help="Print for scripts: one blank between columns, '-' for an empty one.")
@click.option("--memory", is_flag=True, help="Explain where each pool's memory went, or that of the exports named.")
@click.option("--mm-stat", is_flag=True, help="Print a pool's mm_stat line: zram's nine numbers and pages_folded.")
@click.option("--io-stat", is_flag=True, help="Print zram's io_stat line, over the exports named.")
@click.option("--columns", is_flag=True, help="Explain the columns.")
@click.option(
    "--watch",
    "watch_seconds",
    metavar="SECONDS",
    type=SECONDS,
    help="Print again and again, until Ctrl-C; with --json one line each time.",
)
@click.option("--pool", metavar="NAME", shell_complete=pool_names, help="Only this pool.")
@json_option
@control_option
def command(
    *,
    exports: tuple[str, ...],
    output: str | None,
    output_all: bool,
    in_bytes: bool,
    noheadings: bool,
    raw: bool,
    memory: bool,
    mm_stat: bool,
    io_stat: bool,
    columns: bool,
    watch_seconds: float | None,
    pool: str | None,
    as_json: bool,
    control: Path | None,
) -> None:
    """Show pools and their exports.

    The first row of a pool is the pool; its exports follow. TOTAL, SAVED and other memory belong to the pool, because
    exports share objects; UNIQUE is what removing an export frees at once. What a checkpoint or a stream keeps a copy
    of is shared with that copy, and goes with it.
    """
    wanted = {"--columns": columns, "--json": as_json, "--memory": memory, "--mm-stat": mm_stat, "--io-stat": io_stat}
    forms = [option for option, given in wanted.items() if given]
    if len(forms) > 1:
        raise ConfigError(f"{forms[0]} and {forms[1]} print different things; give one of them")
    if columns:
        return click.echo("\n".join(f"{column.heading:12}{column.says}" for column in COLUMNS))
    chosen = COLUMNS if output_all else choose(COLUMNS, output or DEFAULT_COLUMNS)
    whole = as_json and output is None and not output_all
    asked = {column.heading for column in chosen}
    walk = memory or bool(asked & WALKED)

    def as_text(found: object) -> str:
        from nbdzram.cli.objects import text_of  # noqa: PLC0415 - the same

        return text_of(found) if watch_seconds is None else to_json(found)

    def look(client: ControlClient) -> str:
        if whole:
            from nbdzram.cli.objects import stat_object  # noqa: PLC0415 - people read tables
            from nbdzram.status import Account  # noqa: PLC0415 - the same

            return as_text(stat_object(select(client.status_as(Account), exports, pool), client.usage()))
        status = select(_held(client, asked), exports, pool)
        usage = client.usage() if walk and not (mm_stat or io_stat) else {}
        shown = list(_lines(status, usage, pools=not exports))
        if as_json:
            from nbdzram.cli.objects import rows_object  # noqa: PLC0415 - the same

            return as_text(rows_object(chosen, shown))
        if memory:
            # An export's figures are its own: those of a pool are sums over all that it holds, whatever was named.
            lines = _lines(status, usage, pools=False) if exports else _pool_lines(status, usage)
            return "\n\n".join("\n".join(explain(line, in_bytes=in_bytes)) for line in lines)
        if mm_stat:
            return _mm_stat_line(status)
        if io_stat:
            return _io_stat_line(status)
        width = screen_width()
        return "\n".join(render(chosen, shown, in_bytes=in_bytes, headings=not noheadings, raw=raw, width=width))

    with connect(control) as client:
        if watch_seconds is None:
            click.echo(look(client))
            return warn_of_a_start(client)
        return _watch(lambda: look(client), watch_seconds)


def _held(client: ControlClient, asked: Set[str]) -> Holdings:
    """Of what the server says, what these columns need."""
    if not asked & COUNTED:
        return client.status_as(Holdings)
    from nbdzram.status import Account  # noqa: PLC0415 - a table seldom needs more

    account = client.status_as(Account)
    return Holdings(account.pools, account.exports)


def _watch(look: Callable[[], str], seconds: float) -> None:
    """Print what `look` gives, each time over the last on a terminal, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):  # an ordinary way to leave
        while True:
            told = look()
            click.clear()  # nothing in a pipe, and where there are no colours
            click.echo(told)
            time.sleep(seconds)


def select(status: Whole, exports: Sequence[str], pool: str | None) -> Whole:
    """Only what was asked for. Raises NoSuchExport."""
    names, of_pools = [export.name for export in status.exports], [found.name for found in status.pools]
    for name in exports:
        if name in of_pools and name not in names:  # as it stands in the same table
            raise NoSuchExport(f"'{name}' is a pool and no export; --pool {name} shows it")
        require_export(name, names)
    if pool is not None and pool not in of_pools:
        raise NoSuchExport.among(of_pools, pool, "pool")
    kept = tuple(
        export
        for export in status.exports
        if (not exports or export.name in exports) and (pool is None or export.pool == pool)
    )
    holding = {export.pool for export in kept} if exports else {found.name for found in status.pools}
    pools = tuple(found for found in status.pools if found.name in holding and pool in (None, found.name))
    return status._replace(exports=kept, pools=pools)


def explain(line: Line, *, in_bytes: bool = False) -> Iterator[str]:
    """Where memory went: of a pool a sum from what clients stored to what the host spares; what an export needs."""
    return _explain_pool(line, in_bytes) if line.export is None else _explain_export(line.export, line, in_bytes)


def _explain_export(export: ExportFigures, line: Line, in_bytes: bool) -> Iterator[str]:
    usage = line.usage.get(export.name)
    yield f"export {said(export.name)} of pool {export.pool}"
    if usage is None:
        yield "  it was made a moment ago, and its blocks are not counted yet"
        return
    same_filled = f"{usage.same_filled // 4096} same-filled, without an object"
    rows = (
        ("", "blocks stored", usage.stored, same_filled),
        ("", "needed by it alone", usage.unique, "removing it frees this at once"),
        ("+", "shared", usage.shared, "held by others or a checkpoint's copy too, or by several of its blocks"),
        ("=", "compressed blocks", usage.compressed, "an object counted once a block"),
    )
    yield from _sum_of(rows, in_bytes)


def _explain_pool(line: Line, in_bytes: bool) -> Iterator[str]:
    stats = line.pool.stats
    unique, shared = _unique(line), _shared(line)
    assert isinstance(unique, int)
    assert isinstance(shared, int)
    frag = stats.mem_used_total - stats.compr_data_size
    # By block, not by holder: what clones reach through tables that they share is in no object's count of sharers.
    spared = max(sum(usage.compressed for usage in _costs(line)) - stats.compr_data_size, 0)
    taken = stats.memory_used
    limit = f"{100 * taken / stats.mem_limit:.0f} % of the limit" if stats.mem_limit else ""
    rows = (
        ("", "blocks stored", stats.orig_data_size, f"{stats.same_pages} same-filled, without an object"),
        ("", "needed by one export alone", unique, "removing that export frees it at once"),
        ("+", "shared", shared, f"held by several or a copy; it spares {_size(spared, in_bytes)}"),
        ("=", "compressed objects", stats.compr_data_size, f"{stats.objects} objects, {_codecs(stats, in_bytes)}"),
        ("+", "fragmentation", frag, "rounding, free slots: `nbdzram compact`"),
        ("=", "memory used", stats.mem_used_total, f"highest {_size(stats.mem_used_max, in_bytes)}"),
        ("+", "metadata", stats.metadata, "block tables, handles, indexes"),
        ("=", "taken in all", taken, limit),
        ("", "saved, metadata deducted", stats.orig_data_size - taken, _verdict(stats.orig_data_size, taken)),
    )
    yield f"pool {line.pool.name}"
    yield from _sum_of(rows, in_bytes)


def _sum_of(rows: Sequence[tuple[str, str, int, str]], in_bytes: bool) -> Iterator[str]:
    """Each row: a sign, a name, a size, and what to know about it."""
    width = max(len(_size(size, in_bytes)) for _, _, size, _ in rows)
    for sign, name, size, says in rows:
        yield f"  {sign:1} {name:26}  {_size(size, in_bytes):>{width}}  {says}".rstrip()


def _lines(status: Holdings, usage: Mapping[str, DiskUsage], *, pools: bool) -> Iterator[Line]:
    for line in _pool_lines(status, usage):
        if pools:
            yield line
        for export in line.exports:
            yield line._replace(export=export)


def _pool_lines(status: Holdings, usage: Mapping[str, DiskUsage]) -> Iterator[Line]:
    for pool in status.pools:
        yield Line(pool, None, [export for export in status.exports if export.pool == pool.name], usage)


def _size(size: int, in_bytes: bool) -> str:
    return str(size) if in_bytes else format_size(size)


def _codecs(stats: PoolStats, in_bytes: bool) -> str:
    named = [f"{name} {_size(size, in_bytes)}" for name, size in sorted(stats.compr_by_codec.items()) if size]
    return ", ".join(named) or "none yet"


def _verdict(stored: int, taken: int) -> str:
    if not stored:
        return "nothing is stored yet: empty tables"
    if stored < taken:
        return "below zero: the tables take more"
    return f"{stored / taken:.2f} to 1"


def _kind(export: ExportFigures | None) -> str:
    if export is None:
        return "pool"
    return "disk-ro" if export.read_only else "disk"


def _mm_stat_line(status: Holdings) -> str:
    if len(status.pools) != 1:
        names = ", ".join(pool.name for pool in status.pools)
        raise ConfigError(f"--mm-stat prints one pool's line; name one of {names} with --pool")
    return " ".join(f"{number:8}" for number in status.pools[0].stats.mm_stat())


def _io_stat_line(status: Holdings) -> str:
    fields = ("failed_reads", "failed_writes", "invalid_io", "notify_free")
    return " ".join(f"{sum(getattr(export, field) for export in status.exports):8}" for field in fields)
