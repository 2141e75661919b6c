"""`nbdzram reload`: let the server read its configuration again, and say what came of it."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, json_option, print_json
from nbdzram.status import ReloadReport, from_json


@click.command("reload", epilog="\b\nExamples:\n  nbdzram reload\n  nbdzram reload --json")
@json_option
@control_option
def command(*, as_json: bool, control: Path | None) -> None:
    """Let the server read its configuration file again, as SIGHUP does, and print what it changed.

    Exports, pools, access, limits, maintenance and certificates change while clients are served; an error in the
    configuration changes nothing. What is declared no more stays until it is removed; what needs a restart is named.
    """
    with connect(control) as client:
        answer = client.call("reload")
    if as_json:
        return print_json(answer)
    report = from_json(ReloadReport, answer)
    for line in report.lines():
        click.echo(line)
    return None
