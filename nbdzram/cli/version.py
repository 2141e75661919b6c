"""`nbdzram version`: which program this is, and what a running server is."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram import __version__
from nbdzram.cli.common import connect, control_option, json_option, print_json
from nbdzram.cli.objects import SCHEMA
from nbdzram.errors import NoServerHere, UserError
from nbdzram.status import Brief


@click.command("version", epilog="\b\nExamples:\n  nbdzram version\n  nbdzram version --json")
@json_option
@control_option
def command(*, as_json: bool, control: Path | None) -> None:
    """Print this program's version, that of the server that runs here, and the number of the JSON schema."""
    server, why_not = None, "none found"
    try:
        with connect(control) as client:
            server = client.status_as(Brief).version
    except NoServerHere:
        pass
    except UserError as error:  # not ours, or it does not answer: the program's own version is known all the same
        why_not = str(error)
    if as_json:
        return print_json({"schema": SCHEMA, "version": __version__, "server_version": server})
    click.echo(f"nbdzram {__version__}")
    return click.echo(f"server  {server or why_not}")
