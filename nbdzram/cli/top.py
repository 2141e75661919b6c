"""`nbdzram top`: a live view of one server in a terminal."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # as in __main__
import contextlib
import os
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbdzram.cli.common import connect, control_option
from nbdzram.cli.numbers import SECONDS
from nbdzram.cli.objects import top_object
from nbdzram.cli.terminals import may_draw_on
from nbdzram.cli.view import SORTS, Frame, screen
from nbdzram.control.client import ControlClient
from nbdzram.rates import between
from nbdzram.ready import readable
from nbdzram.status import to_json

if TYPE_CHECKING:
    from rich.console import Console

USAGE_SECONDS = 5.0  # what exports' blocks cost is worth asking so often; the server bounds it too
QUIT_KEYS = b"qQ\x04"  # \x04: Ctrl-D
SUSPEND_KEY = b"\x1a"  # Ctrl-Z: stopped by the terminal itself, the view would stay there, and the keys with it
SORT_KEY = b"s"
PIPE_WIDTH = 80


@click.command(
    "top",
    epilog="\b\nExamples:\n  nbdzram top\n  nbdzram top --sort stored --interval 5\n  nbdzram top --once | head -3",
)
@click.option(
    "--interval",
    metavar="SECONDS",
    type=SECONDS,
    default=1.0,
    show_default=True,
    help="Time between two looks.",
)
@click.option("--sort", type=click.Choice(list(SORTS)), default="traffic", show_default=True, help="Order of exports.")
@click.option("--once", is_flag=True, help="Print once and end, as it does in a pipe and on TERM=dumb.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON at each look, until Ctrl-C; once with --once."
)
@control_option
def command(*, interval: float, sort: str, once: bool, as_json: bool, control: Path | None) -> None:
    """Watch exports, traffic, latency and memory live.

    In the view, q or Ctrl-C ends it and s changes the order of the exports.
    """
    with connect(control) as client:
        if as_json:
            with contextlib.suppress(KeyboardInterrupt):
                _print_lines(client, interval, once=once)
            return
        if once or not may_draw_on(sys.stdout):
            _print_once(client, interval, sort)
            return
        with contextlib.suppress(KeyboardInterrupt):  # an ordinary way to leave
            while _watch(client, interval, sort):
                os.killpg(0, _signal.SIGTSTP)  # and whatever else stands in the same pipe


def _print_lines(client: ControlClient, interval: float, *, once: bool) -> None:
    before, more = client.status(), True
    while more:
        time.sleep(interval)
        after = client.status()
        click.echo(to_json(top_object(after, *between(before, after))))
        before, more = after, not once


def _print_once(client: ControlClient, interval: float, sort: str) -> None:
    frame = Frame(client.status(), usage=client.usage(), sort=sort)
    time.sleep(interval)
    _advance(frame, client)
    console = _console(None if sys.stdout.isatty() else PIPE_WIDTH)
    lines = len(frame.status.exports) + 100
    console.print(screen(frame, console.width, lines, keys=False, encoding=console.encoding))


def _watch(client: ControlClient, interval: float, sort: str) -> bool:
    """Whether it is left for a while: the terminal is as it was before."""
    from rich.live import Live  # noqa: PLC0415 - --help is quick without it

    frame, asked = Frame(client.status(), usage=client.usage(), sort=sort), time.monotonic()
    console = _console()
    client.late = None  # a line across the view would tell less than the view that stands still
    with _keys() as descriptor, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + min(interval, 0.3)  # the first rates come soon
        while True:
            shown = screen(frame, console.width, console.height, keys=True, encoding=console.encoding)
            live.update(shown, refresh=True)
            pressed = _wait(descriptor, due - time.monotonic())
            if pressed and pressed in QUIT_KEYS + SUSPEND_KEY:
                return pressed == SUSPEND_KEY
            if pressed == SORT_KEY:
                orders = list(SORTS)
                frame.sort = orders[(orders.index(frame.sort) + 1) % len(orders)]
            if time.monotonic() >= due:
                if time.monotonic() - asked > USAGE_SECONDS:
                    frame.usage, asked = client.usage(), time.monotonic()
                _advance(frame, client)
                due = time.monotonic() + interval


def _console(width: int | None = None) -> Console:
    """As wide as the terminal, unless told. Rich takes for a number of columns, or lines, what has digits of any kind,
    and falls over a raised one."""
    from rich.console import Console  # noqa: PLC0415 - as above

    for variable in ("COLUMNS", "LINES"):
        if not os.environ.get(variable, "0").isdecimal():
            del os.environ[variable]
    return Console(width=width, highlight=False)


def _advance(frame: Frame, client: ControlClient) -> None:
    """The next status, and what happened since the last."""
    status = client.status()
    frame.all_rates, frame.rates = between(frame.status, status)
    frame.status = status
    frame.history.append(frame.all_rates)


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """Standard input with single key presses and without echo; None if it is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        ours = termios.tcgetattr(descriptor)
        ours[6][termios.VSUSP] = b"\0"  # Ctrl-Z is a key
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, ours)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _wait(descriptor: int | None, seconds: float) -> bytes:
    """One key, or nothing when the time is over."""
    if descriptor is None:
        readable(seconds=seconds)
        return b""
    return os.read(descriptor, 1) if readable(descriptor, seconds=seconds) else b""
