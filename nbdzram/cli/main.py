"""The command line's front door: finds the command, runs it, turns refusals into one sentence and an exit code.

A command's module is imported only when it is called, because the serving process must not carry what the others
need. Exit codes: 0 done, 1 failed, 2 usage, 3 server unreachable, 4 no such export.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # as in __main__
import contextlib
import errno
import gc
import importlib
import os
import sys
from collections.abc import Callable, Collection

import click

from nbdzram import __version__
from nbdzram.cli.terminals import is_dumb
from nbdzram.cli.usage import Told
from nbdzram.errors import UserError

STDOUT, STDERR = 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""What a file, disk or terminal says that takes no more output; any other OSError that gets here is our bug."""

COMMANDS = {
    "serve": "Serve disks over NBD.",
    "stat": "Show pools and exports, as zramctl does.",
    "top": "Watch exports, traffic, latency and memory live.",
    "fold": "Merge equal objects of a pool.",
    "compact": "Give sparsely used pages back to the system.",
    "recompress": "Store resting blocks again with Zstandard.",
    "check": "Hold every stored block against its fingerprint.",
    "reload": "Let the server read its configuration again.",
    "runs": "Show, cancel, pause and resume maintenance runs.",
    "exports": "List, add, change, rename, remove, reset and roll back exports.",
    "ls": "List the exports, as `exports list` does.",
    "rm": "Remove exports, as `exports remove` does.",
    "pools": "List, add, remove and limit pools.",
    "clients": "List the clients that are attached, or end one.",
    "snapshot": "Offer a read-only copy of an export, at once.",
    "clone": "Offer a writable copy of an export, at once.",
    "send": "Write exports as a stream, for a file or another server.",
    "receive": "Offer the exports of a stream.",
    "streams": "Show streams under way and what is kept of broken ones.",
    "attach": "Attach an export to /dev/nbdN, or show how.",
    "doctor": "Look for what would keep a server from running well here.",
    "estimate": "Tell how much memory disk images would need.",
    "health": "Say whether the server here serves.",
    "version": "Print the program's version, and the server's.",
    "completion": "Print a shell's completion script.",
}
"""Every command and its one line, in the order of the help; its module is nbdzram.cli.NAME, the function `command`."""

ELSEWHERE = {
    "create": "`nbdzram exports add` offers a new disk.",
    "delete": "`nbdzram exports remove` removes a disk.",
    "help": "`nbdzram --help` lists the commands, `nbdzram COMMAND --help` explains one.",
    "scrub": "`nbdzram check` looks at every block now; `nbdzram serve --scrub-interval` does it by itself.",
    "restore": "`nbdzram receive` offers the exports of a stream, `nbdzram serve --restore` begins with them.",
    "takeover": "`nbdzram serve --takeover` goes on in place of the server that runs.",
    "detach": "`nbd-client -d /dev/nbdN` detaches a disk, `qemu-nbd -d` one of QEMU's.",
    "start": "`nbdzram serve` starts a server, or `systemctl start nbdzram` where a unit does.",
    "stop": "Ctrl-C or SIGTERM stops a server, or `systemctl stop nbdzram` where a unit runs it.",
}
"""What others call it, where the nearest of our names is something else."""

LOOSE = {
    "serve": "A disk is told by -e NAME=SIZE.",
    **dict.fromkeys(("fold", "compact", "recompress", "check"), "A pool is told by --pool NAME."),
    "pools add": "Its limit is told by --mem-limit SIZE.",
    "clients list": "An export is told by --export NAME.",
    "doctor": "A configuration is told by -c FILE.",
    **dict.fromkeys(("ls", "exports list"), "`nbdzram stat NAME` shows one export."),
}
"""Where a word belongs that stands there by itself, of commands that take none."""

GROUPS = ("exports", "pools", "clients", "runs", "streams")
"""Those that have commands of their own."""


class Front(Told):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command's own object."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"nbdzram.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        gc.enable()  # a command may run for long
        if _signal.getsignal(_signal.SIGINT) is _signal.SIG_DFL:  # as for the imports; or ignored, as it stays
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # what a command began is cleared away
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command; a mistyped one gets the nearest name in its error."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib  # noqa: PLC0415 - only a mistake pays for it

            if args[0] in ELSEWHERE:
                raise click.UsageError(f"No such command '{args[0]}'. {ELSEWHERE[args[0]]}", error.ctx) from None
            below = [f"{group} {args[0]}" for group in GROUPS if args[0] in self._below(ctx, group)]
            if below:
                raise click.UsageError(f"No such command '{args[0]}'. Did you mean '{below[0]}'?", error.ctx) from None
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near or "Did you mean" in error.message:  # later versions of click ask themselves
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", error.ctx) from None

    def _below(self, ctx: click.Context, group: str) -> Collection[str]:
        """The names of a command's own commands."""
        command = self.get_command(ctx, group)
        assert isinstance(command, click.Group)
        return command.commands

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The table, without importing every command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Front,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # https://no-color.org; None: as the terminal is
        "color": False if os.environ.get("NO_COLOR") or is_dumb() else None,
    },
    epilog="\b\nExamples:\n  nbdzram serve -e disk=1G   # serve a disk of 1 GiB, and say how to attach it\n"
    "  nbdzram stat               # what is stored, and in how much memory\n"
    "  nbdzram fold               # store equal blocks once\n\n"
    "The --help of each command shows more. Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 3 no server, "
    "4 no such export or pool.",
)
@click.option(
    "--control",
    metavar="PATH",
    help="The server's control socket, for every command.  [default: where `serve` puts it]",
)
@click.version_option(__version__, prog_name="nbdzram", message="%(prog)s %(version)s")
def front(*, control: str | None) -> None:
    """A network block device server whose disks live compressed and deduplicated in RAM."""


def run(arguments: list[str], first: Callable[[], None] | None = None) -> int:
    """Run one command line; the exit code. `first`: ends that this process goes first where memory runs out; None: it
    never did."""
    try:
        answer = front.main(args=arguments, prog_name="nbdzram", standalone_mode=False, obj=first or (lambda: None))
    except UserError as error:
        _complain(str(error))
        return error.exit_code
    except click.ClickException as error:
        _on_stderr(_with_the_option(error, arguments).show)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error, click.Abort) and error.__cause__ is None:
            _on_stderr(lambda: click.echo(err=True))
        return INTERRUPTED
    except RuntimeError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11: of an import that was at a class's attributes
            return INTERRUPTED
        raise
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        _complain(f"cannot write the output: {error.strerror}; free some space, or send it elsewhere")
        _drop(STDOUT)
        return UserError.exit_code
    return answer if isinstance(answer, int) else 0  # what a command exits with; click's main gives it back


def _with_the_option(error: click.ClickException, arguments: list[str]) -> click.ClickException:
    """The same, where no word stands by itself that an option should be before."""
    if isinstance(error, click.UsageError) and error.ctx is None:  # of an option that stands before the command
        error.ctx = click.Context(front, info_name="nbdzram")
    if not isinstance(error, click.UsageError) or not error.message.startswith("Got unexpected extra argument"):
        return error
    named = (" ".join(arguments[:2]), arguments[0])
    hint = next((LOOSE[command] for command in named if command in LOOSE), None)
    return click.UsageError(f"{error.message}. {hint}", error.ctx) if hint else error


def _complain(sentence: str) -> None:
    _on_stderr(lambda: click.echo(f"nbdzram: {sentence}", err=True))


def _on_stderr(show: Callable[[], None]) -> None:
    """Where nobody can be told why, the exit code tells it all the same."""
    try:
        show()
        sys.stderr.flush()
    except OSError:
        _drop(STDERR)


def _drop(number: int) -> None:
    """What could not be written is not tried once more at the exit, where Python would end with its words and 120."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
