"""`nbdzram check`: hold every stored block against its fingerprint."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import control_option, cpu_option, json_option, pool_option
from nbdzram.cli.perform import perform


@click.command("check", epilog="\b\nExamples:\n  nbdzram check\n  nbdzram check --pool default --cpu 25")
@pool_option
@cpu_option
@json_option
@control_option
def command(*, pool: str | None, cpu: int, as_json: bool, control: Path | None) -> None:
    """Decode every stored object, hold it against its fingerprint, and recount the pool.

    Ends with exit code 1 if something does not match. Clients go on meanwhile; counts of what they change during the
    recount are passed over, and told as "changing".
    """
    perform("check", control=control, as_json=as_json, pool=pool, cpu_percent=cpu)
