"""Servers that take over from each other, a client that never rests, and how a test takes part in a takeover itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdzram.control.client import ControlClient
from nbdzram.server.handover import FORMAT, KNOWS
from tests.support.nbd_client import Client
from tests.support.programs import PROGRAM_SECONDS
from tests.support.server import START_SECONDS, Nbdzram

MIB = 1 << 20
SIZE = 512 * MIB
_PATIENT = """
import nbdzram.server.listener as listener
from nbdzram.__main__ import main
listener.REST_SECONDS = listener.STOPPED_SECONDS = 3600.0
main()
"""
PATIENT = ("-c", _PATIENT)
"""What Python runs: a server that waits for the rest of a payload as long as a busy machine lets the test take."""


class Line:
    """Servers that take over from each other: one control socket, one state directory or none, one address."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str] = (),
        exports: dict[str, str] | None = None,
        *,
        in_memory: bool = False,
        program: Sequence[str] = ("-m", "nbdzram"),
        behind: Sequence[str] = (),
    ) -> None:
        """`program`: what Python runs as the first of them; `behind`: a command that runs every one."""
        self.directory = directory
        self.control = directory / "c.sock"
        self.state = "" if in_memory else str(directory / "state")
        self.arguments = [*(["--state-dir", self.state] if self.state else []), *arguments]
        self.exports = exports or {"disk": str(SIZE)}
        self.behind = behind
        self._numbers = itertools.count()
        self.servers = [self._server([], program=program)]

    def _server(
        self, more: Sequence[str], behind: Sequence[str] = (), program: Sequence[str] = ("-m", "nbdzram")
    ) -> Nbdzram:
        line = self

        class Member(Nbdzram):
            def environment(self) -> dict[str, str]:
                self.command[self.command.index("--control") + 1] = str(line.control)
                self.command[1:3] = program
                self.command[:0] = behind or line.behind
                self.control = line.control
                return super().environment()

        place = self.directory / str(next(self._numbers))
        place.mkdir()
        return Member(place, self.exports, arguments=[*self.arguments, *more])

    @property
    def last(self) -> Nbdzram:
        return self.servers[-1]

    def take_over(self, more: Sequence[str] = (), behind: Sequence[str] = ()) -> Nbdzram:
        """`behind`: a command that runs the new server."""
        before = self.last
        self.servers.append(self._server(["--takeover", *more], behind))
        assert before.process.wait(START_SECONDS) == 0, before.log
        return self.last

    def attached(self) -> int:
        """How often anybody attached."""
        return sum(server.log.count("attached to export") for server in self.servers)

    def busy(self) -> int:
        """How many clients have asked for more than one asks that only looks at the export."""
        with ControlClient(self.control) as control:
            return sum(client.requests > 20 for client in control.clients())

    def accepted(self) -> int:
        with ControlClient(self.control) as control:
            return control.status().connections_total


class Beater(threading.Thread):
    """A client that writes and reads without a pause of its own, and knows the longest that it had."""

    def __init__(self, client: Client, first: int = SIZE // 4) -> None:
        """It uses 2 MiB of the disk from `first` on."""
        super().__init__()
        self.client = client
        self.first = first
        self.ended = threading.Event()
        self.rounds = 0
        self.longest_seconds = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        noise = random.Random(5)
        try:
            while not self.ended.is_set():
                began, block = time.monotonic(), noise.randbytes(4096)
                offset = self.first + self.rounds % 512 * 4096
                self.client.write(offset, block)
                assert self.client.read(offset, 4096) == block
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def beat(self) -> None:
        """Wait for another round."""
        before, deadline = self.rounds, time.monotonic() + PROGRAM_SECONDS
        while self.rounds < before + 2:
            assert self.is_alive(), self.error
            assert time.monotonic() < deadline
            self.ended.wait(0.01)

    def end(self) -> None:
        self.ended.set()
        self.join()
        assert self.error is None, self.error


@contextlib.contextmanager
def beating(line: Line) -> Iterator[Beater]:
    with beating_on(line.last) as beater:
        yield beater


@contextlib.contextmanager
def beating_on(server: Nbdzram, first: int = SIZE // 4) -> Iterator[Beater]:
    """See Beater."""
    with server.client() as client:
        beater = Beater(client, first)
        beater.start()
        try:
            beater.beat()
            yield beater
        finally:
            beater.end()


def ask(
    line: Line, place: Path, *, speaks: int = FORMAT, knows: Sequence[str] = KNOWS, state: str | None = None
) -> None:
    with ControlClient(line.control) as control:
        state_dir = line.state if state is None else state
        control.call(
            "takeover", socket=str(place), pid=os.getpid(), format=speaks, knows=list(knows), state_dir=state_dir
        )


@contextlib.contextmanager
def listening(place: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(1)
        listener.settimeout(START_SECONDS)
        yield listener


def ends_when_it_is_to_take(line: Line, place: Path) -> None:
    """A takeover by this process that ends before anything was given."""
    with listening(place) as listener:
        ask(line, place)
        listener.accept()[0].close()
