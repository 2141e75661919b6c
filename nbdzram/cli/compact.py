"""`nbdzram compact`: give sparsely used pages back."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import control_option, cpu_option, json_option, pool_option
from nbdzram.cli.perform import perform


@click.command("compact", epilog="\b\nExamples:\n  nbdzram compact\n  nbdzram compact --pool default --json")
@click.option("--dry-run", is_flag=True, help="Only tell what it would do.")
@pool_option
@cpu_option
@json_option
@control_option
def command(*, pool: str | None, cpu: int, dry_run: bool, as_json: bool, control: Path | None) -> None:
    """Move objects out of sparsely used pages, and give the emptied pages back to the system."""
    perform("compact", control=control, as_json=as_json, pool=pool, cpu_percent=cpu, dry_run=dry_run)
