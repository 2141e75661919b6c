"""`nbdzram send`: exports, as they are now, as a stream on standard output; or what is left of one that broke."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nbdzram.cli.common import connect, control_option, export_names, json_option
from nbdzram.cli.flow import Meter, settle
from nbdzram.cli.objects import text_of
from nbdzram.errors import UserError
from nbdzram.status import SendReport, from_json
from nbdzram.units import counted, format_size


@click.command(
    "send",
    epilog="\b\nExamples:\n  nbdzram send vm1 > vm1.stream\n  nbdzram send --all | ssh other nbdzram receive\n"
    "  nbdzram send vm1@tuesday --since monday > tuesday.stream\n"
    "  nbdzram send vm1 --resumable | ssh other nbdzram receive --resumable",
)
@click.argument("exports", metavar="[EXPORT]...", nargs=-1, shell_complete=export_names)
@click.option("--all", "everything", is_flag=True, help="Every export, all of one moment.")
@click.option(
    "--since",
    metavar="SNAPSHOT",
    shell_complete=export_names,
    help="Only what changed since a snapshot that the receiver has: its name, or X of EXPORT@X.",
)
@click.option("--resumable", is_flag=True, help="If the pipe breaks, keep the moment for an hour, for --resume.")
@click.option(
    "--resume",
    metavar="TOKEN",
    help="Go on with a stream that broke; `nbdzram receive` told the token, and `nbdzram streams` there shows it.",
)
@json_option
@control_option
def command(
    *,
    exports: tuple[str, ...],
    everything: bool,
    since: str | None,
    resumable: bool,
    resume: str | None,
    as_json: bool,
    control: Path | None,
) -> None:
    """Write what EXPORT holds now to standard output, as a stream for `nbdzram receive` or `serve --restore`.

    Clients go on meanwhile; what they write later is not in it. Each object is sent once, as it is stored, however many
    exports hold it. A block that is not what was written ends the stream, and nobody receives anything of it.

    With --json the report, on standard error, is JSON.
    """
    if resume is not None and (everything or exports or since is not None):
        raise click.UsageError("What is sent with --resume is what was: name no exports, and no --since.")
    if everything and exports:
        raise click.UsageError("--all is every export: name none beside it.")
    if resume is None and not everything and not exports:
        raise click.UsageError("Name exports, or say --all.")
    if sys.stdout.isatty():
        raise UserError("a stream is nothing for a terminal; send it to a file or a pipe: nbdzram send ... > FILE")
    with connect(control) as client, Meter("sent") as meter:

        def write(content: bytes) -> None:
            sys.stdout.buffer.write(content)
            meter.passed(len(content))

        answer = client.call_for_stream(
            "streams.send", write, exports=list(exports), since=since, resumable=resumable, resume=resume
        )
        sys.stdout.buffer.flush()
        try:
            settle(sys.stdout.fileno())
        except OSError as error:
            raise UserError(f"what was sent is not on the disk: {error.strerror}; send it again, elsewhere") from None
    if as_json:
        return click.echo(text_of(answer), err=True)
    report = from_json(SendReport, answer)
    click.echo(
        f"sent {counted(len(report.exports), 'export')}, {counted(report.blocks, 'block')}, "
        f"{counted(report.objects, 'object')}: "
        f"{format_size(report.stream_bytes)} in {report.seconds:.1f} s",
        err=True,
    )
    return None
