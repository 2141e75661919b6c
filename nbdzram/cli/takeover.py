"""`serve --takeover`: ask the server that runs for all that it serves, and take it (server/handover)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdzram.config import TcpAddress
from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable, UserError
from nbdzram.machine import Machine
from nbdzram.ready import readable
from nbdzram.server.descriptors import raise_limit
from nbdzram.server.handover import (
    ANSWER_SECONDS,
    CREDENTIALS,
    FORMAT,
    KNOWS,
    PEER,
    SERVING,
    Handover,
    has_ended,
    metrics_at,
)
from nbdzram.server.steadily import SLOW_SECONDS
from nbdzram.units import counted

log = logging.getLogger("nbdzram.server")


class GiverEnded(Exception):
    """The process that was to give ended before it did."""


@dataclass(slots=True)
class Takeover:
    """What was taken, and the way to say that it is served."""

    handover: Handover
    giver: socket.socket
    process: int | None  # a descriptor of the other process, if that is seen from here
    serves: Callable[[], None] | None = None
    counts: Callable[[], None] = lambda: None
    told_to_stop: Callable[[], bool] = lambda: False

    def confirm(self) -> None:
        """The other process may leave: we serve. Whoever waits for that is told, too.

        Raises UserError: it has given us up, and goes on; or is to, as we would serve only to end, with all clients.
        One that has ended needs no word: whoever has the arenas serves, and by now that is us alone.
        """
        has_ended_before = self.process is not None and readable(self.process, seconds=0)
        if self.told_to_stop() and not has_ended_before:
            raise UserError("told to stop before this server served, so the other goes on")
        self.counts()
        try:
            self.giver.sendall(SERVING)
        except OSError:
            if not _wait_for_end(self.process):
                raise UserError("the other server goes on: this one was not ready in time") from None
        if self.serves is not None:
            self.serves()


@contextlib.contextmanager
def take_over(
    control: Path,
    state_dir: Path | None,
    metrics: TcpAddress | None,
    serves: Callable[[], None] | None = None,
    counts: Callable[[], None] = lambda: None,
) -> Iterator[Takeover | None]:
    """Everything of the server on this control socket; None where none runs. Blocks. Raises UserError: it refuses.

    `metrics`: where ours are to be had. `counts` is called as soon as more would be lost with this process than with
    the other.
    """
    place = control.parent / f".{os.getpid()}"  # beside it: private to its owner, and its name is short enough
    raise_limit()  # a descriptor for which there is no place is gone
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(socket.AF_UNIX))
        mask = os.umask(0o177)
        try:
            place.unlink(missing_ok=True)
            listener.bind(str(place))
        except OSError as error:
            raise UserError(
                f"cannot make a socket beside the control socket {control}: {error.strerror or error}; name another "
                "with --control PATH"
            ) from None
        finally:
            os.umask(mask)
        taken = None
        try:
            listener.listen(1)
            giver, process = _ask(control, listener, place, state_dir, [*KNOWS, metrics_at(metrics)])
            held.enter_context(giver)
            if process is not None:
                held.callback(os.close, process)
            giver.settimeout(ANSWER_SECONDS)
            taken = Takeover(_take(giver, process), giver, process, serves, counts)
        except ServerUnreachable:
            log.info("no server runs here that could be taken over; starting")
        except (GiverEnded, ConnectionError) as ended:
            log.warning("%s; starting", ended)
        finally:
            place.unlink(missing_ok=True)
        if taken is None:
            counts()
        else:
            log.info("taking over from a server with %s", counted(len(taken.handover.clients), "client"))
        yield taken


def _ask(
    control: Path, listener: socket.socket, place: Path, state_dir: Path | None, knows: list[str]
) -> tuple[socket.socket, int | None]:
    """The connection on which the server gives, once it does, and a descriptor of its process, if that is seen from
    here. Raises ServerUnreachable, GiverEnded, UserError."""
    with ControlClient(control) as client, contextlib.ExitStack() as held:
        agreed = None
        try:
            agreed = client.call(
                "takeover",
                socket=str(place.absolute()),  # who gives may be in another directory
                pid=os.getpid(),
                format=FORMAT,
                knows=knows,
                state_dir="" if state_dir is None else str(state_dir.absolute()),
                unit=Machine().unit() or "",
            )
        except ServerUnreachable:  # its last answer may be lost, as it ends; it connects before it agrees
            if not readable(listener.fileno(), seconds=0):
                raise
        # Of who agreed: the one asked first may have left unasked, and to the kernel it is he who answers as long as
        # he was the last to listen there. By name, or, in another namespace, as that tells of both.
        giver, number = _accept(listener, {agreed, client.server_pid})
        process = None
        with contextlib.suppress(OSError):  # it lives in another namespace, say, or has ended
            process = os.pidfd_open(number)
            held.callback(os.close, process)
        if not readable(giver.fileno(), seconds=SLOW_SECONDS):
            log.warning("the other server ends what it has under way first; its log says for what it waits")
        if giver.recv(1, socket.MSG_PEEK):  # which may take: it ends first what can be ended while clients are served
            held.pop_all()
            return giver, process
        giver.close()
        _wait_for_end(process)
        raise GiverEnded("the server ended before it gave anything away")


def _take(giver: socket.socket, process: int | None) -> Handover:
    """All that it gives. Raises UserError; GiverEnded: it was killed at that, and nobody else goes on with anything."""
    try:
        return Handover.take(giver)
    except ConnectionError:
        if not _wait_for_end(process):
            raise UserError("the other server did not give everything away, and goes on") from None
        raise GiverEnded("the server ended before it had given everything away") from None


def _wait_for_end(process: int | None) -> bool:
    """Of a server that hung up: until then it may have its other sockets and its arenas. Whether it has ended, as far
    as can be told: an arena has one server in any case."""
    return process is None or has_ended(process)


def _accept(listener: socket.socket, servers: set[int | None]) -> tuple[socket.socket, int]:
    """The connection of the server, which connected before it agreed, and nobody else's; and its process's number.
    Raises UserError."""
    listener.settimeout(0)
    while True:
        try:
            giver, _ = listener.accept()
        except BlockingIOError:
            raise UserError("the other server agreed, and is not here to give anything away") from None
        giver.setblocking(True)
        peer = int(CREDENTIALS.unpack(giver.getsockopt(*PEER, CREDENTIALS.size))[0])
        if peer in servers:
            return giver, peer
        log.warning("process %d, which is not the server, connected to take part in a takeover; hanging up on it", peer)
        giver.close()


def load_what_serves() -> None:
    """Modules that are loaded when they are needed: while clients of another server wait is too late."""
    import nbdzram.control.server  # noqa: PLC0415
    import nbdzram.metrics.http  # noqa: PLC0415
    import nbdzram.server.service  # noqa: F401, PLC0415
