"""What fold, compact, recompress and check share: ask the server, show progress, show before and after.

Progress goes to standard error, the result to standard output: a bar on a terminal, in a pipe only what the run waits
for. The run is the server's: Ctrl-C ends the waiting, asks whether the run shall end too, and says how to end it later.
"""

from __future__ import annotations

import shlex
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nbdzram.cli.columns import Cell, Column, render, screen_width
from nbdzram.cli.common import connect, print_json
from nbdzram.control.client import ControlClient
from nbdzram.engine.stats import PoolStats
from nbdzram.ready import readable
from nbdzram.status import RunReport, RunStatus, from_json
from nbdzram.units import format_seconds, format_size

Figure = tuple[str, Callable[[PoolStats], int]]

UNTOLD = {"comparisons", "objects_seen"}
"""What a run did and not what came of it: --json has it, the sentence does not."""

ENDED = {"done", "failed", "cancelled"}
LOOK_SECONDS = 1.0
"""As long as somebody thinks about a question, the run is looked at so often: it may end by itself."""

HINT_BYTES = 1 << 20
HINT_SHARE = 10
"""Gaps of more than a tenth, and a mebibyte, are worth a compaction, and a word about it."""

MEMORY_FIGURES: list[Figure] = [
    ("stored (orig_data_size)", lambda stats: stats.orig_data_size),
    ("compressed (compr_data_size)", lambda stats: stats.compr_data_size),
    ("memory used (mem_used_total)", lambda stats: stats.mem_used_total),
    ("fragmentation", lambda stats: stats.mem_used_total - stats.compr_data_size),
    ("metadata", lambda stats: stats.metadata),
    ("saved, metadata deducted", lambda stats: stats.saved),
]


def perform(kind: str, *, control: Path | None, as_json: bool, **params: Any) -> None:
    """Run `kind` on the server and print what came of it. Raises UserError."""
    given = {name: value for name, value in params.items() if value is not None}
    watched = Watched()
    try:
        with connect(control) as client, _bars(watched, quiet=as_json):
            answer = client.call("run", watched.tell, kind=kind, **given)
    except KeyboardInterrupt:
        _leave(watched.run, watched.waits_for, control)
        raise
    if as_json:
        return print_json(answer)
    for payload in answer:
        for line in describe(from_json(RunReport, payload)):
            click.echo(line)
    return None


class Watched:
    """The run that is waited for, as the server last told of it."""

    def __init__(self) -> None:
        self.run: RunStatus | None = None
        self.waits_for: RunStatus | None = None
        self.show: Callable[[RunStatus, RunStatus | None], None] = self._say_whom_it_waits_for
        self._said: tuple[int, int] | None = None

    def tell(self, run: RunStatus, waits_for: RunStatus | None) -> None:
        """The server's word of it."""
        self.run, self.waits_for = run, waits_for
        self.show(run, waits_for)

    def _say_whom_it_waits_for(self, run: RunStatus, waits_for: RunStatus | None) -> None:
        """Once for each: who reads a log should know why nothing happens."""
        if waits_for is not None and self._said != (run.number, waits_for.number):
            self._said = (run.number, waits_for.number)
            click.echo(f"{_name(run)} waits for {_name(waits_for)}: {standing(waits_for)}", err=True)


def standing(run: RunStatus) -> str:
    """Where a run stands, in few words: 31 % done, 2 min 5 s left."""
    share = f"{100 * run.done // run.total} % done" if run.total else "just begun"
    left = f", {format_seconds(run.seconds_left)} left" if run.seconds_left is not None else ""
    return f"{run.state}, {share}" if run.state == "paused" else f"{share}{left}"


def _name(run: RunStatus) -> str:
    return f"run {run.number} ({run.kind} of the pool {run.pool})"


def _leave(run: RunStatus | None, waits_for: RunStatus | None, control: Path | None) -> None:
    """Whoever stops waiting is asked whether the run shall stop too, or told how to stop it."""
    where = f" --control {shlex.quote(str(control))}" if control else ""
    if run is None:
        return click.echo(f"\nif it was begun, it goes on in the server; `nbdzram runs{where}` shows it", err=True)
    begun = run.state != "waiting"
    goes_on = f"{_name(run)} {'goes on' if begun else 'waits'} in the server"
    stands = f", {standing(run)}" if begun else ""
    if waits_for is not None:
        stands = f" for {_name(waits_for)}, {standing(waits_for)}"
    click.echo(err=True)
    if sys.stdin.isatty() and sys.stderr.isatty():
        answer = _ask(f"{goes_on}{stands}. Cancel it? [y/N]: ", run.number, control)
        if isinstance(answer, RunStatus):
            return click.echo(_ended(answer), err=True)
        if answer:
            with connect(control) as client:
                client.call("runs.cancel", number=run.number)
            what = "what it did until then stays" if begun else "it had not begun"
            return click.echo(f"cancelled run {run.number}; {what}", err=True)
    click.echo(
        f"{goes_on}; `nbdzram runs{where}` shows it, `nbdzram runs cancel {run.number}{where}` ends it", err=True
    )
    return None


def _ask(question: str, number: int, control: Path | None) -> bool | RunStatus:
    """A person's answer; or the run, if it ends before there is one: then nothing is left to decide."""
    with connect(control) as client:
        click.echo(question, nl=False, err=True)
        try:
            while True:
                while not readable(sys.stdin.fileno(), seconds=LOOK_SECONDS):
                    ended = _run(client, number)
                    if ended is not None and ended.state in ENDED:
                        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # half an answer is no command for the shell
                        click.echo(err=True)
                        return ended
                told = sys.stdin.readline()
                if told.strip().lower() in {"y", "yes"}:
                    return True
                if told.strip().lower() in {"", "n", "no"}:
                    break
                click.echo(f"Error: invalid input\n{question}", nl=False, err=True)  # as click has it
        except KeyboardInterrupt:
            told = ""
        if not told:
            click.echo(err=True)  # behind the question
        return False


def _run(client: ControlClient, number: int) -> RunStatus | None:
    """None: another server answers, which does not know it."""
    found = (from_json(RunStatus, run) for run in client.call("runs"))
    return next((run for run in found if run.number == number), None)


def _ended(run: RunStatus) -> str:
    if run.state == "done":
        return f"{_name(run)} has ended meanwhile: {_figures(run.result)} in {run.seconds:.2f} s"
    if run.state == "failed":
        return f"{_name(run)} has failed meanwhile: {run.error}"
    return f"{_name(run)} was cancelled meanwhile; what it did until then stays"


def describe(report: RunReport) -> Iterator[str]:
    """One report as text: a sentence, then the table of what changed."""
    would = " (dry run: nothing was changed)" if report.dry_run else ""
    yield f"{report.kind} of pool {report.pool}: {_figures(report.result)} in {report.seconds:.2f} s{would}"
    if report.dry_run or report.before == report.after:
        return
    columns: list[Column[Figure]] = [
        Column("", "", lambda figure: figure[0]),
        Column("BEFORE", "", _cell(report.before), True),
        Column("AFTER", "", _cell(report.after), True),
        Column("CHANGE", "", lambda figure: _change(figure[1](report.after) - figure[1](report.before))),
    ]
    yield from render(columns, MEMORY_FIGURES, width=screen_width())
    fragmentation = report.after.mem_used_total - report.after.compr_data_size
    if report.kind != "compact" and fragmentation > max(HINT_BYTES, report.after.mem_used_total // HINT_SHARE):
        yield f"{format_size(fragmentation)} of the memory used are gaps: `nbdzram compact` gives most of them back"


def _figures(result: Mapping[str, int]) -> str:
    told = [
        f"{name.replace('_', ' ')} {_figure(name, one)}" for name, one in result.items() if one and name not in UNTOLD
    ]
    return ", ".join(told) or "nothing to do"


def _cell(stats: PoolStats) -> Callable[[Figure], Cell]:
    return lambda figure: figure[1](stats)


def _change(difference: int) -> str:
    return f"{'+' if difference > 0 else ''}{format_size(difference)}" if difference else "="


def _figure(name: str, value: int) -> str:
    return format_size(value) if "bytes" in name.split("_") else str(value)


@contextmanager
def _bars(watched: Watched, *, quiet: bool) -> Iterator[None]:
    """A bar a run on a terminal; nothing elsewhere, and nothing of rich is imported then."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[int, TaskID] = {}

        def show(run: RunStatus, waits_for: RunStatus | None) -> None:
            told = waits_for or run
            says = f"{run.kind} {run.pool}"
            if waits_for is not None:
                says += f" waits for run {waits_for.number}, {waits_for.kind}"
            elif run.state == "paused":
                says += f", paused: nbdzram runs resume {run.number}"
            left = format_seconds(told.seconds_left) + " left" if told.seconds_left is not None else ""
            if run.number not in tasks:
                tasks[run.number] = bars.add_task(says, total=told.total, left=left)
            total = max(told.total, told.done, 1)
            bars.update(tasks[run.number], description=says, completed=told.done, total=total, left=left)

        watched.show = show
        yield
