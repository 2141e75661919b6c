"""`nbdzram check`: hold every stored block against its fingerprint; or read what can be read of damaged arenas."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbdzram.cli.common import ANY_PATH, control_option, cpu_option, json_option, pool_option
from nbdzram.cli.flow import settle
from nbdzram.cli.objects import text_of
from nbdzram.cli.perform import perform
from nbdzram.errors import ConfigError, UserError
from nbdzram.units import counted, format_size

if TYPE_CHECKING:
    from nbdzram.server.salvage import Salvaged

WRITE_AT_ONCE_BYTES = 1 << 20


@click.command(
    "check",
    epilog="\b\nExamples:\n  nbdzram check\n  nbdzram check --pool default --cpu 25\n"
    "  nbdzram check --state-dir /var/lib/nbdzram --salvage what-is-left.stream",
)
@pool_option
@cpu_option
@click.option(
    "--state-dir",
    metavar="DIR",
    type=ANY_PATH,
    help="With --salvage: the state directory of a server that does not run.",
)
@click.option(
    "--salvage",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read what can be read of the arenas there into a stream, and list what cannot; nothing there is changed.",
)
@json_option
@control_option
def command(
    *,
    pool: str | None,
    cpu: int,
    state_dir: Path | None,
    salvage: Path | None,
    as_json: bool,
    control: Path | None,
) -> None:
    """Decode every stored object, hold it against its fingerprint, and recount the pool.

    Ends with exit code 1 if something does not match, and names the blocks that cannot be read. Clients go on
    meanwhile; counts of what they change during the recount are passed over, and told as "changing".

    With --state-dir and --salvage no server is asked: exports are read out of damaged arenas into a stream, which
    `nbdzram receive` and `serve --restore` take. A block that is lost is a hole there. The exit code is 1 if anything
    is missing.
    """
    if (state_dir is None) != (salvage is None):
        raise ConfigError(
            "--state-dir and --salvage belong together: from where to read, and where to write the stream"
        )
    if state_dir is not None and salvage is not None:
        _salvage(state_dir, salvage, as_json=as_json)
    else:
        perform("check", control=control, as_json=as_json, pool=pool, cpu_percent=cpu)


def _salvage(directory: Path, path: Path, *, as_json: bool) -> None:
    from nbdzram.server.chains import sync_directory  # noqa: PLC0415 - what serves, which no other way of a check needs
    from nbdzram.server.salvage import salvage  # noqa: PLC0415 - the same

    to_pipe = str(path) == "-"
    if to_pipe and sys.stdout.isatty():
        raise ConfigError("a stream is nothing for a terminal; redirect it, or name a file")
    try:
        descriptor = os.dup(1) if to_pipe else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a file that is not there yet") from None
    try:
        with os.fdopen(descriptor, "wb", WRITE_AT_ONCE_BYTES) as out:

            def write(content: bytes) -> None:
                out.write(content)

            outcome = salvage(directory, write)
            out.flush()
            settle(out.fileno())
        if not to_pipe:
            sync_directory(path.parent)
    except BaseException as error:
        if not to_pipe:
            path.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        raise
    if as_json:
        click.echo(text_of(outcome), err=to_pipe)
    else:
        for line in _lines(outcome):
            click.echo(line, err=to_pipe)
    if not outcome.whole:
        raise SystemExit(1)


def _lines(outcome: Salvaged) -> Iterator[str]:
    yield from outcome.notes
    for pool in outcome.lost_pools:
        yield f"lost: {pool}"
    if outcome.lost_exports:
        yield f"lost: {counted(outcome.lost_exports, 'export')}, with names and sizes that are not what was written"
    for lost in outcome.lost:
        last = lost.first + lost.count - 1
        blocks = f"block {lost.first}" if lost.count == 1 else f"blocks {lost.first} to {last}"
        yield f"lost: {blocks} of export '{lost.export}'"
    exports, blocks = counted(len(outcome.exports), "export"), counted(outcome.blocks, "block")
    yield f"read {exports}, {blocks} with content; a stream of {format_size(outcome.stream_bytes)}"
