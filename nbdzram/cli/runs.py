"""`nbdzram runs`: what maintenance does in the server, what waits for it, and how to end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import (
    Group,
    connect,
    control_option,
    each_once,
    json_option,
    one_by_one,
    print_json,
    print_rows,
    require_all,
)
from nbdzram.cli.numbers import Whole
from nbdzram.status import RunStatus, from_json
from nbdzram.units import format_seconds

RUN_NUMBER = Whole(1, of="number of a run; `nbdzram runs` shows them")

COLUMNS: list[Column[RunStatus]] = [
    Column("RUN", "", lambda run: run.number),
    Column("KIND", "", lambda run: f"{run.kind} (dry run)" if run.dry_run else run.kind),
    Column("POOL", "", lambda run: run.pool),
    Column("STATE", "", lambda run: run.state),
    Column("DONE", "", lambda run: f"{share(run):.0f} %"),
    Column("TOOK", "", lambda run: format_seconds(run.seconds)),
    Column("LEFT", "", lambda run: "" if run.seconds_left is None else format_seconds(run.seconds_left)),
    Column("REASON", "", lambda run: run.reason),
    Column("ERROR", "", lambda run: run.error or ""),
]

POSSIBLE = {
    "runs.cancel": {"waiting", "running", "paused"},
    "runs.pause": {"running"},
    "runs.resume": {"paused"},
}
"""Of a run in these states; the server has the last word (server/runs.py)."""


@click.group(
    "runs",
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nbdzram runs\n  nbdzram runs cancel 4\n  nbdzram runs pause 4",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, control: Path | None) -> None:
    """Show maintenance runs that wait, are under way, or ended lately; cancel, pause and resume them.

    A pool does one run at a time; the others wait in the order in which they were asked for.
    """
    if context.invoked_subcommand is None:
        show(as_json=as_json, control=control)


@command.command("list", epilog="Example: nbdzram runs list --json")
@json_option
@control_option
def list_(*, as_json: bool, control: Path | None) -> None:
    """Show the runs, as `nbdzram runs` alone does."""
    show(as_json=as_json, control=control)


@command.command("cancel", epilog="Example: nbdzram runs cancel 4 5")
@click.argument("numbers", metavar="RUN...", nargs=-1, required=True, callback=each_once, type=RUN_NUMBER)
@json_option
@control_option
def cancel(*, numbers: tuple[int, ...], as_json: bool, control: Path | None) -> None:
    """End runs, or take them out of the queue. What they did until then stays."""
    _tell("runs.cancel", numbers, as_json, control)


@command.command("pause", epilog="Example: nbdzram runs pause 4")
@click.argument("numbers", metavar="RUN...", nargs=-1, required=True, callback=each_once, type=RUN_NUMBER)
@json_option
@control_option
def pause(*, numbers: tuple[int, ...], as_json: bool, control: Path | None) -> None:
    """Hold runs that are under way. Those behind them in the queue wait on."""
    _tell("runs.pause", numbers, as_json, control)


@command.command("resume", epilog="Example: nbdzram runs resume 4")
@click.argument("numbers", metavar="RUN...", nargs=-1, required=True, callback=each_once, type=RUN_NUMBER)
@json_option
@control_option
def resume(*, numbers: tuple[int, ...], as_json: bool, control: Path | None) -> None:
    """Let paused runs go on."""
    _tell("runs.resume", numbers, as_json, control)


def show(*, as_json: bool, control: Path | None) -> None:
    """Print the runs. Raises UserError."""
    with connect(control) as client:
        answer = client.call("runs")
    if as_json:
        return print_json(answer)
    if not answer:
        return click.echo("no run waits, is under way, or ended since the server started")
    print_rows(COLUMNS, [from_json(RunStatus, run) for run in answer])
    return None


def share(run: RunStatus) -> float:
    """How much of it is done, in percent."""
    if run.state == "done":
        return 100.0
    return 100 * run.done / run.total if run.total else 0.0


def _tell(method: str, numbers: tuple[int, ...], as_json: bool, control: Path | None) -> None:
    with connect(control) as client:
        if len(numbers) > 1:
            runs = [from_json(RunStatus, run) for run in client.call("runs")]
            against = {run.number: "" if run.state in POSSIBLE[method] else f"is {run.state}" for run in runs}
            require_all("run", numbers, against, "`nbdzram runs` shows them")
        one_by_one(numbers, lambda number: client.call(method, number=number), _told, as_json=as_json, as_list=True)


def _told(answer: Any) -> str:
    run = from_json(RunStatus, answer)
    return f"run {run.number} ({run.kind} of the pool {run.pool}) is {run.state}, {share(run):.0f} % done"
