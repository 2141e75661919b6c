"""`nbdzram fold`: merge equal objects of a pool."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import control_option, cpu_option, json_option, pool_option
from nbdzram.cli.perform import perform


@click.command(
    "fold",
    epilog="\b\nExamples:\n  nbdzram fold\n  nbdzram fold --dry-run --json\n  nbdzram fold --pool default --cpu 25",
)
@click.option("--dry-run", is_flag=True, help="Only tell what it would do.")
@pool_option
@cpu_option
@json_option
@control_option
def command(*, pool: str | None, cpu: int, dry_run: bool, as_json: bool, control: Path | None) -> None:
    """Merge equal objects, so that each distinct block is stored once.

    Contents are compared byte by byte before two become one. Clients go on meanwhile.
    """
    perform("fold", control=control, as_json=as_json, pool=pool, cpu_percent=cpu, dry_run=dry_run)
