"""`serve --upgrade`: what a service manager runs where it is to reload, and waits for (ExecReload= of the unit).

A server of this version reads its configuration again: nobody waits for that. One of another version is taken over by a
process of this one, which goes on in the background once it serves. The reload ends when the old one has left: before
that the service manager may take the old one for the unit's main process still.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import click

from nbdzram import __version__
from nbdzram.control.client import ControlClient
from nbdzram.ready import readable
from nbdzram.status import ReloadReport, from_json

SERVES = b"1"
LEAVING_SECONDS = 10.0
"""For the old one to tell the service manager who is in its place, and to be gone."""


def reload_if_current(control: Path) -> int | None:
    """The server that is to be taken over, by a descriptor of its process; None: it is of this version, and so has
    read its configuration again.

    Raises ServerUnreachable, and UserError for an error in the configuration.
    """
    with ControlClient(control) as client:
        running = client.call("status")["version"]  # and nothing else, which other versions may tell otherwise
        if running != __version__:
            click.echo(f"version {running} serves; version {__version__} takes over")
            return os.pidfd_open(client.server_pid)
        for line in from_json(ReloadReport, client.call("reload")).lines():
            click.echo(line)
        return None


def go_to_background(old: int) -> Callable[[], None]:
    """Go on in a process of its own, and end this one when that says, by what is returned here, that it serves.

    This one ends with 0 then, once the process `old` is gone, and with 1 if the other ends before it serves. Before
    there are threads.
    """
    reads, writes = os.pipe()
    if os.fork():
        os.close(writes)
        if os.read(reads, len(SERVES)) != SERVES:
            raise click.exceptions.Exit(1)
        readable(old, seconds=LEAVING_SECONDS)
        raise click.exceptions.Exit(0)
    os.close(reads)
    os.close(old)
    if os.fork():
        os._exit(0)  # so that systemd is the parent of the other, and hears of its end
    os.setsid()

    def serves() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more, and the clients are ours by now
            os.write(writes, SERVES)
        os.close(writes)

    return serves
