"""`nbdzram snapshot`: a read-only copy of an export, at once and without storing anything again."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import control_option, export_names, json_option, offer_copy


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
    offer_copy("snapshot", export, name, read_only=True, as_json=as_json, control=control)
