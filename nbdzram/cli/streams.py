"""`nbdzram streams`: what is sent and received, what is kept of streams that broke, and how to give that up."""

from __future__ import annotations

from pathlib import Path

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import (
    Group,
    connect,
    control_option,
    each_once,
    json_option,
    one_by_one,
    print_json,
    print_rows,
    require_all,
)
from nbdzram.status import StreamStatus, from_json
from nbdzram.units import format_seconds, format_size

COLUMNS: list[Column[StreamStatus]] = [
    Column("STREAM", "", lambda stream: stream.stream),
    Column("WAY", "", lambda stream: stream.way),
    Column("STATE", "", lambda stream: stream.state),
    Column("RECORDS", "", lambda stream: stream.records),
    Column("SIZE", "", lambda stream: format_size(stream.stream_bytes)),
    Column("FOR", "", lambda stream: "" if stream.seconds_left is None else format_seconds(stream.seconds_left)),
    Column("EXPORTS", "", lambda stream: " ".join(stream.exports)),
]


@click.group(
    "streams",
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nbdzram streams\n  nbdzram streams abandon 00112233445566778899aabbccddeeff",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, control: Path | None) -> None:
    """Show the streams that are sent and received, and what is kept of those that broke.

    What was begun with --resumable is kept, on the side where this server is, for an hour: the moment of what was sent,
    or what came. It takes memory until then, and gives way when a write finds no room. For what came the token is shown
    with which `nbdzram send --resume` goes on.
    """
    if context.invoked_subcommand is None:
        show(as_json=as_json, control=control)


@command.command("list", epilog="Example: nbdzram streams list --json")
@json_option
@control_option
def list_(*, as_json: bool, control: Path | None) -> None:
    """Show the streams, as `nbdzram streams` alone does."""
    show(as_json=as_json, control=control)


@command.command("abandon", epilog="Example: nbdzram streams abandon 00112233445566778899aabbccddeeff")
@click.argument("names", metavar="STREAM...", nargs=-1, required=True, callback=each_once)
@json_option
@control_option
def abandon(*, names: tuple[str, ...], as_json: bool, control: Path | None) -> None:
    """Give up what is kept of streams, by the names that `nbdzram streams` shows, or by tokens."""
    with connect(control) as client:
        if len(names) > 1:
            from nbdzram.stream.position import read_identity  # noqa: PLC0415 - for this alone

            known = {one["stream"] for one in client.call("streams")}
            there = {name: "" for name in names if read_identity(name).hex() in known}
            require_all("the stream", names, there, "`nbdzram streams` shows what is kept")

        def abandon_one(name: str) -> dict[str, str]:
            client.call("streams.abandon", name=name)
            return {"abandoned": name}

        one_by_one(
            names,
            abandon_one,
            lambda done: f"nothing is kept of the stream {done['abandoned']}",
            as_json=as_json,
            as_list=True,
        )


def show(*, as_json: bool, control: Path | None) -> None:
    """Print the streams. Raises UserError."""
    with connect(control) as client:
        answer = client.call("streams")
    if as_json:
        return print_json(answer)
    streams = [from_json(StreamStatus, stream) for stream in answer]
    if not streams:
        return click.echo("no stream is under way, and nothing is kept of one")
    print_rows(COLUMNS, streams)
    for stream in streams:
        if stream.token is not None:
            what = stream.exports[0] if stream.exports else stream.stream
            click.echo(f"go on with {what}: nbdzram send --resume {stream.token}")
    return None
