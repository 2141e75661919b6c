"""`nbdzram snapshot`: a read-only copy of an export, at once and without storing anything again."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, export_names, json_option, print_json


@click.command("snapshot", epilog="Example: nbdzram snapshot disk disk-monday")
@click.argument("export", shell_complete=export_names)
@click.argument("name")
@json_option
@control_option
def command(*, export: str, name: str, as_json: bool, control: Path | None) -> None:
    """Offer a read-only copy of what EXPORT holds now.

    Nothing is stored again: both share their objects until one of them is written. Clients of EXPORT go on; what they
    hold in caches of their own is not in the copy.
    """
    with connect(control) as client:
        answer = client.call("exports.copy", source=export, name=name, read_only=True)
    if as_json:
        return print_json(answer)
    click.echo(f"snapshot of {export} is offered as {name}")
    return None
