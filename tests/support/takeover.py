"""Servers that take over from each other, a client that never rests, and how a test takes part in a takeover itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdzram.control.client import ControlClient
from nbdzram.server.handover import FORMAT, KNOWS
from tests.support.nbd_client import Client
from tests.support.programs import PROGRAM_SECONDS, require_program
from tests.support.server import START_SECONDS, Nbdzram

MIB = 1 << 20
SIZE = 512 * MIB
_PATIENT = """
import nbdzram.server.listener as listener
from nbdzram.__main__ import main
listener.REST_SECONDS = listener.STOPPED_SECONDS = 3600.0
main()
"""
PLAIN = ("-m", "nbdzram")
PATIENT = ("-c", _PATIENT)
"""What Python runs: a server that waits for the rest of a payload as long as a busy machine lets the test take."""
JOBS = """
[global]
ioengine=nbd
uri={uri}
iodepth=8
size=8M
rw=randwrite
bsrange=512-128k
bs_unaligned
refill_buffers
verify=crc32c
verify_fatal=1
do_verify=1
loops=1000000
offset_increment=16M
[clients]
numjobs=8
"""


class Line:
    """Servers that take over from each other: one control socket, one state directory or none, one address."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str] = (),
        exports: dict[str, str] | None = None,
        *,
        in_memory: bool = False,
        program: Sequence[str] = PLAIN,
        successors: Sequence[str] = PLAIN,
        behind: Sequence[str] = (),
    ) -> None:
        """What Python runs as the first of them, and as the others; `behind`: a command that runs every one."""
        self.directory = directory
        self.control = directory / "c.sock"
        self.state = "" if in_memory else str(directory / "state")
        self.arguments = [*(["--state-dir", self.state] if self.state else []), *arguments]
        self.exports = exports or {"disk": str(SIZE)}
        self.successors = successors
        self.behind = behind
        self._numbers = itertools.count()
        self.servers = [self._server([], program=program)]

    def _server(self, more: Sequence[str], behind: Sequence[str] = (), program: Sequence[str] | None = None) -> Nbdzram:
        line = self

        class Member(Nbdzram):
            def environment(self) -> dict[str, str]:
                self.command[self.command.index("--control") + 1] = str(line.control)
                self.command[1:3] = program or line.successors
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

    def numbers(self) -> set[int]:
        """Of who is attached: none is given twice."""
        with ControlClient(self.control) as control:
            return {client.number for client in control.clients()}

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
) -> int:
    """Which process agreed."""
    with ControlClient(line.control) as control:
        state_dir = line.state if state is None else state
        agreed = control.call(
            "takeover", socket=str(place), pid=os.getpid(), format=speaks, knows=list(knows), state_dir=state_dir
        )
    assert isinstance(agreed, int)
    return agreed


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


@contextlib.contextmanager
def fio_on(line: Line) -> Iterator[subprocess.Popen[str]]:
    """Eight connections that write and verify until they are told to end, and were right."""
    fio = require_program("fio", package="fio")
    jobs = line.directory / "jobs.fio"
    jobs.write_text(JOBS.format(uri=line.last.uri()))
    running = subprocess.Popen(
        [fio, "--output-format=json", jobs],
        cwd=line.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line.last.wait_until(lambda: line.busy() >= 8, START_SECONDS)  # all looks at the size are over
        yield running
        assert running.poll() is None, running.communicate()[0]
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=PROGRAM_SECONDS)
        report = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
        assert [job["error"] for job in report["jobs"]] == [0] * 8, printed
    finally:
        running.kill()
        running.wait()


def take_over_under_fio(line: Line, times: int) -> float:
    """The longest pause that a client beside them saw."""
    with fio_on(line) as fio, beating(line) as beater:
        clients = line.numbers()
        for _ in range(times):
            line.take_over()
            beater.beat()
            assert fio.poll() is None
        assert len(clients) == 9
        assert line.numbers() == clients, "somebody connected again"
    for server in line.servers:
        assert "Traceback" not in server.log, server.log
    return beater.longest_seconds


def fill_half(line: Line) -> None:
    """256 MiB that do not compress, where those clients write nothing."""
    with line.last.client() as client:
        for offset in range(SIZE // 2, SIZE, MIB):
            client.write(offset, random.Random(offset).randbytes(MIB))
