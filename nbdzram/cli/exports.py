"""`nbdzram exports`: list, add, remove, resize and reset exports of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import (
    Size,
    connect,
    control_option,
    export_names,
    json_option,
    list_rows,
    pool_names,
    print_json,
    remove_named,
)
from nbdzram.status import ExportStatus, from_json
from nbdzram.units import format_size

COLUMNS: list[Column[ExportStatus]] = [
    Column("NAME", "", lambda export: export.name),
    Column("POOL", "", lambda export: export.pool),
    Column("DISKSIZE", "", lambda export: export.size_bytes, True),
    Column("DATA", "", lambda export: export.stored_bytes, True),
    Column("ACCESS", "", lambda export: "ro" if export.read_only else "rw"),
    Column("CLIENTS", "", lambda export: export.connections),
    Column("DESCRIPTION", "", lambda export: export.description),
]

force_option = click.option("--force", is_flag=True, help="Even if that destroys content or ends connections.")


@click.group("exports", epilog="\b\nExamples:\n  nbdzram exports list\n  nbdzram exports add scratch 10G")
def command() -> None:
    """List, add, remove, resize and reset exports of a running server.

    With --state-dir the server remembers these changes.
    """


@command.command("list", epilog="Example: nbdzram exports list --json")
@json_option
@control_option
def list_(*, as_json: bool, control: Path | None) -> None:
    """List the exports."""
    list_rows(COLUMNS, lambda status: status.exports, as_json=as_json, control=control)


@command.command("add", epilog="Example: nbdzram exports add scratch 10G --description 'build trees'")
@click.argument("name")
@click.argument("size", type=Size())
@click.option("--pool", metavar="NAME", shell_complete=pool_names, help="The pool that holds it.  [default: default]")
@click.option("--read-only", is_flag=True, help="Clients may not write.")
@click.option("--description", metavar="TEXT", default="", help="What clients are told of it.")
@json_option
@control_option
def add(
    *,
    name: str,
    size: int,
    pool: str | None,
    read_only: bool,
    description: str,
    as_json: bool,
    control: Path | None,
) -> None:
    """Offer a new, empty disk."""
    given = {"name": name, "size_bytes": size, "read_only": read_only, "description": description}
    _change("exports.add", control, as_json, "added", **given, **({"pool": pool} if pool else {}))


@command.command("remove", epilog="Example: nbdzram exports remove scratch")
@click.argument("name", shell_complete=export_names)
@force_option
@json_option
@control_option
def remove(*, name: str, force: bool, as_json: bool, control: Path | None) -> None:
    """Remove a disk with its content. Its clones and snapshots stay."""
    remove_named("exports.remove", name, as_json=as_json, control=control, force=force)


@command.command("resize", epilog="Example: nbdzram exports resize scratch 20G")
@click.argument("name", shell_complete=export_names)
@click.argument("size", type=Size())
@click.option("--force", is_flag=True, help="Shrink, which destroys what lies behind; clients must have detached.")
@json_option
@control_option
def resize(*, name: str, size: int, force: bool, as_json: bool, control: Path | None) -> None:
    """Change a disk's size. Clients see the new size when they attach again."""
    _change("exports.resize", control, as_json, "resized", name=name, size_bytes=size, force=force)


@command.command("reset", epilog="Example: nbdzram exports reset scratch")
@click.argument("name", shell_complete=export_names)
@force_option
@json_option
@control_option
def reset(*, name: str, force: bool, as_json: bool, control: Path | None) -> None:
    """Empty a disk, as zramctl --reset does."""
    _change("exports.reset", control, as_json, "reset", name=name, force=force)


def _change(method: str, control: Path | None, as_json: bool, done: str, **params: Any) -> None:
    with connect(control) as client:
        answer = client.call(method, **params)
    if as_json:
        return print_json(answer)
    export = from_json(ExportStatus, answer)
    click.echo(f"{done} {export.name} ({format_size(export.size_bytes)} in pool {export.pool})")
    return None
