"""What the client commands share: the control option, --json, sizes as parameters, lists."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # as in __main__
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbdzram.cli.columns import Column, Row, render, screen_width
from nbdzram.cli.numbers import Whole
from nbdzram.cli.usage import Told, or_before_the_command
from nbdzram.control.client import ControlClient
from nbdzram.control.paths import socket_for_client
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.status.encoding import from_json
from nbdzram.units import format_size, said

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nbdzram.status import Brief, ExportFigures, Named

Command = TypeVar("Command", bound=Callable[..., Any])
Name = TypeVar("Name", str, int)

ANY_PATH: click.Path = click.Path(path_type=Path, readable=False)
"""A file that click does not try: whoever opens it says better why it cannot. Shells have expanded its `~`."""


class OurPath(click.ParamType[Path]):
    """A path that the configuration may name too, and that reads as it does there: `~` is the home directory."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Whoever opens it says better why it cannot."""
        if isinstance(value, str) and value and "~" not in value and "\0" not in value:
            return Path(value)
        from nbdzram.values import path  # noqa: PLC0415 - which the configuration comes with

        try:
            return value if isinstance(value, Path) else path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """As for any file."""
        return ANY_PATH.shell_complete(ctx, param, incomplete)


OUR_PATH = OurPath()


class Size(click.ParamType[int]):
    """A disk's size in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it as zramctl reads sizes."""
        from nbdzram.values import export_size  # noqa: PLC0415 - the same

        try:
            return export_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Bound(click.ParamType[int]):
    """One of bounds.Bounds."""

    def __init__(self, bound: str) -> None:
        self.bound = bound
        self.name = bound

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it as the configuration does."""
        from nbdzram.values import BOUNDS  # noqa: PLC0415 - the same

        try:
            return BOUNDS[self.bound](value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def export_names(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """For a shell's completion: the exports of the server that the command would ask. Silent when there is none."""
    return _known(context, lambda status: status.exports, incomplete)


def pool_names(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The same for pools."""
    return _known(context, lambda status: status.pools, incomplete)


def _known(context: click.Context, pick: Callable[[Brief], Sequence[Named]], incomplete: str) -> list[str]:
    from nbdzram.status import Brief  # noqa: PLC0415 - shells alone complete

    try:
        with connect(context.params.get("control")) as client:
            return [one.name for one in pick(client.status_as(Brief)) if one.name.startswith(incomplete)]
    except UserError:
        return []


def control_option(command: Command) -> Command:
    """--control PATH, which may also stand before the command."""
    return click.option(
        "--control",
        metavar="PATH",
        type=OUR_PATH,
        callback=_or_before_the_command,
        help="The server's control socket.  [default: where `serve` puts it]",
    )(command)


def _or_before_the_command(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    value = or_before_the_command(context, option, value)
    return OUR_PATH.convert(value, option, context) if isinstance(value, str) else value


def json_option(command: Command) -> Command:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def pool_option(command: Command) -> Command:
    """--pool NAME."""
    return click.option("--pool", metavar="NAME", shell_complete=pool_names, help="Only this pool.  [default: all]")(
        command
    )


def cpu_option(command: Command) -> Command:
    """--cpu PERCENT."""
    return click.option(
        "--cpu",
        metavar="PERCENT",
        type=Whole(1, 100),
        default=100,
        show_default=True,
        help="Share of one processor core to use; while clients are served, 50 at most.",
    )(command)


def in_other_words(command: click.Command, name: str, *, epilog: str) -> click.Command:
    """The same command under another name, with an example of its own."""
    return click.Command(name, callback=command.callback, params=command.params, help=command.help, epilog=epilog)


def connect(control: Path | None, late: Callable[[str], None] | None = None) -> ControlClient:
    """A connection to the server. `late` in place of a line, where an answer takes long. Raises ServerUnreachable."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)  # `nbdzram stat | head` ends quietly, as other tools do
    return ControlClient(control or socket_for_client(os.environ), late or _tell_late)


def _tell_late(sentence: str) -> None:
    click.echo(f"nbdzram: {sentence}; Ctrl-C ends the wait", err=True)


def warn(sentence: str) -> None:
    """Of what was done, beside its result."""
    click.echo(f"nbdzram: warning: {sentence}", err=True)


OTHERS_WORDS = {
    "remove": "rm delete del destroy drop",
    "list": "ls show status",
    "add": "create new",
    "rename": "mv move",
    "change": "set edit update modify",
    "reset": "wipe clear empty zero",
    "rollback": "revert restore undo",
    "disconnect": "kill end rm remove drop",
    "cancel": "stop kill abort end rm remove",
    "pause": "suspend hold",
    "resume": "continue unpause",
    "abandon": "rm remove delete cancel drop",
}
"""What others call a command of a group."""


class Group(Told):
    """Commands of a noun; who types another word is told ours."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command; a wrong one gets the right word in its error, or all that there are."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib  # noqa: PLC0415 - only a mistake pays for it

            meant = [name for name in self.commands if args[0] in OTHERS_WORDS.get(name, "").split()]
            meant += difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"Did you mean '{meant[0]}'?" if meant else f"There are {', '.join(sorted(self.commands))}."
            raise click.UsageError(f"No such command '{args[0]}'. {hint}", error.ctx) from None


def warn_of_a_start(client: ControlClient) -> None:
    """Whoever reads a table of disks should know where it is not whole."""
    if client.starting:
        warn("the server is starting, and has not opened all of its disks yet")


def print_json(value: Any) -> None:
    """Print for programs, readable for people; records are objects."""
    from nbdzram.cli.objects import text_of  # noqa: PLC0415 - people read tables

    click.echo(text_of(value))


def list_rows(
    columns: Sequence[Column[Row]],
    kind: type[Row],
    what: str,
    *,
    as_json: bool,
    control: Path | None,
) -> None:
    """Print the server's exports, or its pools: `what` its status has, records of this kind. Raises UserError."""
    with connect(control) as client:
        told = client.status_part(what)
        warn_of_a_start(client)
    if as_json:
        return print_json(told)
    print_rows(columns, [from_json(kind, one) for one in told])
    return None


def print_rows(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> None:
    """A table as wide as the terminal, without the columns that most servers have nothing in, if this one has not."""
    columns = [column for column in columns if not column.seldom or any(column.cell(row) for row in rows)]
    for line in render(columns, rows, width=screen_width()):
        click.echo(line)


def require_export(name: str, known: Collection[str]) -> None:
    """Raises NoSuchExport, as the server does where it is asked for one."""
    if name not in known:
        raise NoSuchExport.among(known, name)


def require_all(what: str, names: Sequence[Any], found: Mapping[Any, str], remedy: str) -> None:
    """Of several that a command names nothing is done where one is not there, or cannot be done. Raises UserError.

    `found` says of each that is there what is against it, if anything is. Of one alone the server says so itself, in
    more words.
    """
    wrong = [
        f"{what} {_told(name)} {found.get(name, 'is not there')}" for name in names if found.get(name, "is not there")
    ]
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: nothing is done; {remedy}")


def _told(name: object) -> str:
    return said(name) if isinstance(name, str) else str(name)


def one_by_one(
    names: Sequence[Name], act: Callable[[Name], Any], tell: Callable[[Any], str], *, as_json: bool, as_list: bool
) -> None:
    """Act on each in turn, and tell of it as it is done. What fails all the same ends this: in JSON, too, those before
    it are told. `as_list` is for one alone.
    """
    answers: list[Any] = []
    try:
        for name in names:
            answers.append(act(name))
            if not as_json:
                click.echo(tell(answers[-1]))
    finally:
        if as_json and (answers or not names):
            print_json(answers if as_list or len(names) > 1 else answers[0])


def each_once(_: click.Context, __: click.Parameter, names: Sequence[str]) -> tuple[str, ...]:
    """Of words that somebody typed twice one, in their order."""
    return tuple(dict.fromkeys(names))


def remove_named(client: ControlClient, method: str, names: Sequence[str], *, as_json: bool, **params: Any) -> None:
    """Ask the server to remove exports or pools, one by one, and say of each that it is gone. Raises UserError."""

    def remove(name: str) -> dict[str, str]:
        client.call(method, name=name, **params)
        return {"removed": name}

    one_by_one(names, remove, lambda done: f"removed {said(done['removed'])}", as_json=as_json, as_list=False)


def limits_of(export: ExportFigures) -> str:
    """What its clients may ask for a second."""
    bounds = export.bounds
    told = [f"{bounds.iops}/s"] if bounds.iops else []
    return " ".join([*told, *([f"{format_size(bounds.bandwidth_bytes)}/s"] if bounds.bandwidth_bytes else [])])


def offer_copy(kind: str, export: str, name: str, *, read_only: bool, as_json: bool, control: Path | None) -> None:
    """Ask the server for a copy of an export, a `kind` to the person who asked, and say so. Raises UserError."""
    with connect(control) as client:
        answer = client.call("exports.copy", source=export, name=name, read_only=read_only)
    if as_json:
        return print_json(answer)
    click.echo(f"{kind} of {said(export)} is offered as {said(name)}")
    return None
