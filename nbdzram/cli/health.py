"""`nbdzram health`: whether the server here serves, for health checks of containers and supervisors."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, json_option, print_json
from nbdzram.cli.objects import SCHEMA
from nbdzram.control.client import HANGS
from nbdzram.errors import ServerUnreachable, UserError
from nbdzram.status import Brief
from nbdzram.units import counted


@click.command("health", epilog="\b\nExamples:\n  nbdzram health\n  nbdzram health --json")
@json_option
@control_option
def command(*, as_json: bool, control: Path | None) -> None:
    """Say whether the server serves. Exit code 0: it does; 1: it starts, or drains; 3: none answers.

    It asks the control socket, and so needs no metrics address. One that has not answered after 5 s does not serve.
    """
    with connect(control, _give_up) as client:
        status = client.status_as(Brief)
    if as_json:
        ready = not (status.starting or status.draining)
        print_json({"schema": SCHEMA, "ready": ready, "version": status.version, "pid": status.pid})
    if status.starting:
        raise UserError(
            f"the server (pid {status.pid}) is starting: it opens its disks and loads images, and lets clients in then"
        )
    if status.draining:
        raise UserError(f"the server (pid {status.pid}) drains: it answers what was begun, and then ends")
    if not as_json:
        exports, clients = counted(len(status.exports), "export"), counted(status.connections, "connection")
        click.echo(f"serving {exports} to {clients}")


def _give_up(sentence: str) -> None:
    raise ServerUnreachable(f"{sentence}: {HANGS}; its log may tell")
