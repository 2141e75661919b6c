"""`nbdzram receive`: offer what a stream on standard input holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, json_option, pool_names, print_json
from nbdzram.cli.flow import Meter
from nbdzram.errors import UserError
from nbdzram.status import ReceiveReport, from_json
from nbdzram.units import counted, format_size, said


@click.command(
    "receive",
    epilog="\b\nExamples:\n  nbdzram receive < vm1.stream\n  nbdzram receive --prefix old- < monday.stream\n"
    "  nbdzram send --resume TOKEN | ssh other nbdzram receive",
)
@click.option("--prefix", metavar="TEXT", default="", help="Before the names of what is received.")
@click.option(
    "--pool",
    metavar="NAME",
    shell_complete=pool_names,
    help="The pool that all of it goes to.  [default: of the same name as where it lay]",
)
@click.option(
    "--resumable",
    is_flag=True,
    help="If the stream breaks, keep what came for an hour, and tell the token to go on with.",
)
@json_option
@control_option
def command(*, prefix: str, pool: str | None, resumable: bool, as_json: bool, control: Path | None) -> None:
    """Offer the exports of a stream, which `nbdzram send` wrote, read from standard input.

    Blocks that the pool has already are shared with what is there. All of it is offered when the stream has ended and
    is whole, with the access rules that it had; else nothing is, and nothing stays. What `nbdzram send --resume` wrote
    goes on with a stream that broke, where its first part is kept.
    """
    if sys.stdin.isatty():
        raise UserError("a stream comes from a file or a pipe, not from a terminal: nbdzram receive < FILE")
    with connect(control) as client, Meter("received") as meter:

        def read(count: int) -> bytes:
            try:
                content = os.read(sys.stdin.fileno(), count)
            except OSError as error:
                raise UserError(f"cannot read the stream from standard input: {error.strerror}") from error
            meter.passed(len(content))
            return content

        answer = client.call_with_stream("streams.receive", read, prefix=prefix, pool=pool, resumable=resumable)
    if as_json:
        return print_json(answer)
    report = from_json(ReceiveReport, answer)
    for name in report.exports:
        click.echo(f"received {said(name)}")
    folded = f", {report.objects_folded} of them here already" if report.objects_folded else ""
    click.echo(
        f"{counted(report.blocks, 'block')}, {counted(report.objects, 'object')}{folded}: "
        f"{format_size(report.stream_bytes)} in {report.seconds:.1f} s",
        err=True,
    )
    return None
