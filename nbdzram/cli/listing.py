"""The list of exports, apart from what changes them: `nbdzram ls` makes one command and not a dozen."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import control_option, json_option, limits_of, list_rows
from nbdzram.status import ExportFigures


def _admits(export: ExportFigures) -> str:
    rules = [*export.allow_addresses, *(f"cert:{name}" for name in export.allow_certificates)]
    return " ".join(rules) if export.admits == "listed" else export.admits


COLUMNS: list[Column[ExportFigures]] = [
    Column("NAME", "", lambda export: export.name),
    Column("POOL", "", lambda export: export.pool),
    Column("DISKSIZE", "", lambda export: export.size_bytes, True),
    Column("DATA", "", lambda export: export.stored_bytes, True),
    Column("QUOTA", "", lambda export: export.bounds.quota_bytes or None, True, seldom=True),
    Column("LIMITS", "", limits_of, seldom=True),
    Column("ACCESS", "", lambda export: "ro" if export.read_only else "rw"),
    Column("CLIENTS", "", lambda export: export.connections),
    Column("ADMITS", "", _admits),
    Column("DESCRIPTION", "", lambda export: export.description),
]


def show(*, as_json: bool, control: Path | None) -> None:
    """Print the exports. Raises UserError."""
    list_rows(COLUMNS, ExportFigures, "exports", as_json=as_json, control=control)


@click.command("list", epilog="Example: nbdzram exports list --json")
@json_option
@control_option
def list_(*, as_json: bool, control: Path | None) -> None:
    """List the exports, as `nbdzram exports` alone does."""
    show(as_json=as_json, control=control)
