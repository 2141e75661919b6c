"""`nbdzram clients`: who is attached to a running server, and ending one of them."""

from __future__ import annotations

import time
from pathlib import Path

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import (
    Group,
    connect,
    control_option,
    each_once,
    export_names,
    json_option,
    one_by_one,
    print_json,
    print_rows,
    require_all,
    require_export,
)
from nbdzram.cli.numbers import Whole
from nbdzram.control.client import ControlClient
from nbdzram.status import ClientStatus
from nbdzram.units import said

CLIENT_NUMBER = Whole(1, of="number of a client; `nbdzram clients` shows them")

COLUMNS: list[Column[ClientStatus]] = [
    Column("CLIENT", "", lambda client: client.number),
    Column("PEER", "", lambda client: client.peer),
    Column("EXPORT", "", lambda client: client.export),
    Column("ACCESS", "", lambda client: "ro" if client.read_only else "rw"),
    Column("CERTIFICATE", "", lambda client: " ".join(client.certificate_names)),
    Column("SINCE", "", lambda client: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(client.since))),
    Column("REQUESTS", "", lambda client: client.requests),
    Column("IN-FLIGHT", "", lambda client: client.in_flight),
    Column("IDLE", "", lambda client: f"{client.idle_seconds:.0f}s"),
]

export_option = click.option(
    "--export", metavar="NAME", shell_complete=export_names, help="Only clients of this export."
)


@click.group(
    "clients",
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nbdzram clients\n  nbdzram clients disconnect 7\n"
    "  nbdzram clients disconnect --export scratch",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, control: Path | None) -> None:
    """Show the clients that are attached to a running server, or end one."""
    if context.invoked_subcommand is None:
        show(export=None, as_json=as_json, control=control)


@command.command("list", epilog="Example: nbdzram clients list --export disk")
@export_option
@json_option
@control_option
def list_(*, export: str | None, as_json: bool, control: Path | None) -> None:
    """Show the clients, as `nbdzram clients` alone does, or those of one export."""
    show(export=export, as_json=as_json, control=control)


def show(*, export: str | None, as_json: bool, control: Path | None) -> None:
    """Print the clients. Raises UserError."""
    with connect(control) as client:
        found = _of(client, export)
    if as_json:
        return print_json(found)
    if not found:
        return click.echo(f"no client is attached{f' to {said(export)}' if export is not None else ''}")
    print_rows(COLUMNS, found)
    return None


def _of(client: ControlClient, export: str | None) -> list[ClientStatus]:
    """Those of the export, if one is named. Raises NoSuchExport."""
    if export is not None:
        from nbdzram.status import Brief  # noqa: PLC0415 - for this alone

        require_export(export, [one.name for one in client.status_as(Brief).exports])
    return [one for one in client.clients() if export in (None, one.export)]


@command.command(
    "disconnect",
    epilog="\b\nExamples:\n  nbdzram clients disconnect 7\n  nbdzram clients disconnect --export scratch",
)
@click.argument("numbers", metavar="[CLIENT...]", nargs=-1, callback=each_once, type=CLIENT_NUMBER)
@export_option
@json_option
@control_option
def disconnect(*, numbers: tuple[int, ...], export: str | None, as_json: bool, control: Path | None) -> None:
    """End clients, by the number in the list or all of one export, once they have their answers.

    A client that connects again by itself comes back; `nbdzram exports change` keeps it away.
    """
    if not numbers and export is None:
        raise click.UsageError("Name a client by its number in `nbdzram clients list`, or an export with --export.")
    with connect(control) as client:
        if export is not None or len(numbers) > 1:
            attached = {one.number: "" for one in _of(client, export)}
            what = "client" if export is None else f"of {said(export)} the client"
            require_all(what, numbers, attached, "`nbdzram clients list` shows who is attached")
            numbers = numbers or tuple(attached)
        if export is not None and not numbers and not as_json:
            click.echo(f"no client is attached to {said(export)}")

        def end(number: int) -> dict[str, int]:
            client.call("clients.disconnect", number=number)
            return {"disconnected": number}

        one_by_one(numbers, end, lambda done: f"disconnected {done['disconnected']}", as_json=as_json, as_list=True)
