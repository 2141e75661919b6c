"""`nbdzram recompress`: store resting blocks again with Zstandard."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.common import control_option, cpu_option, json_option, pool_option
from nbdzram.cli.numbers import Whole, WholeSeconds
from nbdzram.cli.perform import perform


@click.command(
    "recompress",
    epilog="\b\nExamples:\n  nbdzram recompress\n  nbdzram recompress --idle 1h --level 9 --cpu 50\n"
    "  nbdzram recompress --dictionary --json",
)
@click.option("--level", metavar="N", type=Whole(1, 22), default=3, show_default=True, help="Zstandard's level.")
@click.option(
    "--idle",
    "idle_seconds",
    metavar="SECONDS",
    type=WholeSeconds(0, 10**9),
    default=0,
    show_default=True,
    help="Only blocks that nobody read or wrote for so long, also 10m or 1h.",
)
@click.option("--huge-only", is_flag=True, help="Only blocks that LZ4 could not compress.")
@click.option(
    "--dictionary",
    is_flag=True,
    help="Train a dictionary from the pool's own blocks, those of private exports aside, used where it saves.",
)
@pool_option
@cpu_option
@json_option
@control_option
def command(
    *,
    level: int,
    idle_seconds: int,
    huge_only: bool,
    dictionary: bool,
    pool: str | None,
    cpu: int,
    as_json: bool,
    control: Path | None,
) -> None:
    """Store blocks again with Zstandard, and keep what became smaller.

    Reading such a block takes a few microseconds more. A block that is written again is LZ4 again. A run tries what no
    run as strong has tried; one with a higher level, or with the first dictionary, tries everything. Clients go on
    meanwhile.
    """
    options = {"level": level, "idle_seconds": idle_seconds, "huge_only": huge_only, "dictionary": dictionary}
    perform("recompress", control=control, as_json=as_json, pool=pool, cpu_percent=cpu, **options)
