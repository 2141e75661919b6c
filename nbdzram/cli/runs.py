"""What fold, compact, recompress and check share: ask the server, show progress, show before and after.

Progress goes to standard error, the result to standard output: a bar on a terminal, nothing in a pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nbdzram.cli.columns import Cell, Column, render
from nbdzram.cli.common import connect, print_json
from nbdzram.engine.stats import PoolStats
from nbdzram.status import RunReport, from_json
from nbdzram.units import format_size

Progress = Callable[[str, str, int, int], None]
Figure = tuple[str, Callable[[PoolStats], int]]

UNTOLD = {"comparisons", "objects_seen"}
"""What a run did and not what came of it: --json has it, the sentence does not."""

HINT_BYTES = 1 << 20
HINT_SHARE = 10
"""Gaps of more than a tenth, and a mebibyte, are worth a compaction, and a word about it."""

MEMORY_FIGURES: list[Figure] = [
    ("stored (orig_data_size)", lambda stats: stats.orig_data_size),
    ("compressed (compr_data_size)", lambda stats: stats.compr_data_size),
    ("memory used (mem_used_total)", lambda stats: stats.mem_used_total),
    ("fragmentation", lambda stats: stats.mem_used_total - stats.compr_data_size),
    ("metadata", lambda stats: stats.metadata),
    ("saved, metadata deducted", lambda stats: stats.saved - stats.metadata),
]


def perform(kind: str, *, control: Path | None, as_json: bool, **params: Any) -> None:
    """Run `kind` on the server and print what came of it. Raises UserError."""
    given = {name: value for name, value in params.items() if value is not None}
    with connect(control) as client, _progress(quiet=as_json) as progress:
        answer = client.call("run", progress, kind=kind, **given)
    if as_json:
        return print_json(answer)
    for payload in answer:
        for line in describe(from_json(RunReport, payload)):
            click.echo(line)
    return None


def describe(report: RunReport) -> Iterator[str]:
    """One report as text: a sentence, then the table of what changed."""
    told = [
        f"{name.replace('_', ' ')} {_figure(name, value)}"
        for name, value in report.result.items()
        if value and name not in UNTOLD
    ]
    figures = ", ".join(told) or "nothing to do"
    would = " (dry run: nothing was changed)" if report.dry_run else ""
    yield f"{report.kind} of pool {report.pool}: {figures} in {report.seconds:.2f} s{would}"
    if report.dry_run or report.before == report.after:
        return
    columns: list[Column[Figure]] = [
        Column("", "", lambda figure: figure[0]),
        Column("BEFORE", "", _cell(report.before), True),
        Column("AFTER", "", _cell(report.after), True),
        Column("CHANGE", "", lambda figure: _change(figure[1](report.after) - figure[1](report.before))),
    ]
    yield from render(columns, MEMORY_FIGURES)
    fragmentation = report.after.mem_used_total - report.after.compr_data_size
    if report.kind != "compact" and fragmentation > max(HINT_BYTES, report.after.mem_used_total // HINT_SHARE):
        yield f"{format_size(fragmentation)} of the memory used are gaps: `nbdzram compact` gives most of them back"


def _cell(stats: PoolStats) -> Callable[[Figure], Cell]:
    return lambda figure: figure[1](stats)


def _change(difference: int) -> str:
    return f"{'+' if difference > 0 else ''}{format_size(difference)}" if difference else "="


def _figure(name: str, value: int) -> str:
    return format_size(value) if "bytes" in name.split("_") else str(value)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar a run on a terminal; nothing elsewhere, and nothing of rich is imported then."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("objects"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[tuple[str, str], TaskID] = {}

        def show(kind: str, pool: str, done: int, total: int) -> None:
            if (kind, pool) not in tasks:
                tasks[kind, pool] = bars.add_task(f"{kind} {pool}", total=total)
            bars.update(tasks[kind, pool], completed=done, total=max(total, done, 1))

        yield show
