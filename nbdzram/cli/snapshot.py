"""`nbdzram snapshot`: read-only copies of one export or all, at once and without storing anything again."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, export_names, json_option, offer_copy, print_json
from nbdzram.status import ExportFigures, from_json
from nbdzram.units import said


@click.command("snapshot", epilog="\b\nExamples:\n  nbdzram snapshot disk disk-monday\n  nbdzram snapshot --all monday")
@click.argument("pair", metavar="[EXPORT NAME]", nargs=-1, shell_complete=export_names)
@click.option(
    "--all", "moment", metavar="NAME", help="Of every export that clients may write, of one moment, as EXPORT@NAME."
)
@json_option
@control_option
def command(*, pair: tuple[str, ...], moment: str | None, as_json: bool, control: Path | None) -> None:
    """Offer a read-only copy of what EXPORT holds now.

    Nothing is stored again: both share their objects until one of them is written. Clients of EXPORT go on; what they
    hold in caches of their own is not in the copy.

    With --all the copies are of one moment: what was answered before it is in them, what came later in none. They are
    offered all together, or none is.
    """
    if (moment is None) != (len(pair) == 2):
        raise click.UsageError("Give EXPORT and NAME, or --all NAME.")
    if moment is None:
        export, name = pair
        return offer_copy("snapshot", export, name, read_only=True, as_json=as_json, control=control)
    if pair:
        raise click.UsageError("Give EXPORT and NAME, or --all NAME.")
    with connect(control) as client:
        answer = client.call("moments.take", name=moment)
    if as_json:
        return print_json(answer)
    for copy in answer:
        click.echo(f"snapshot {said(from_json(ExportFigures, copy).name)} is offered")
    return None
