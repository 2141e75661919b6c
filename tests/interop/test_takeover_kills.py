"""Whoever is killed at whatever step of a takeover, one of the two serves: the old one or the new one, and never both.

Each of the two is held at each step (tests/support/held.py) and killed there, or the other is. With a state directory
nothing that was answered is lost, whoever dies; without one all disks live on with whoever has their memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable
from nbdzram.ready import readable
from tests.support.held import NEW, OLD
from tests.support.nbd_client import Client
from tests.support.server import START_SECONDS, Nbdzram
from tests.support.takeover import SIZE, Line, listening
from tests.wire import CMD_WRITE, SIMPLE_REPLY, request

pytestmark = pytest.mark.interop

BLOCK = 4096
HALF = 1000  # bytes of a payload that were sent before the takeover
WRITTEN = 64  # blocks, answered before it
SERVES_ALONE = {("old has given", "new"), ("old has heard", "new")}
"""The new one has said that it serves, or may have: who is killed then was the server, as any that is killed."""
NO_MEMORY_YET = {"new asks", "new was agreed with", "new takes", "old agrees", "old ended runs", "old is at rest"}
NO_MEMORY_YET |= {"old has closed", "old has given text"}
"""Steps at which the old one alone has the disks in memory, or may."""
CASES = [case for case in itertools.product(NEW | OLD, ("old", "new")) if case not in SERVES_ALONE]
QUICK = {("new is ready", "new"), ("new has opened", "new"), ("new has opened", "old"), ("old has given", "old")}


class Held:
    """One takeover whose `step` is held: its two processes, and the connection on which that one waits."""

    def __init__(self, directory: Path, step: str, *, in_memory: bool) -> None:
        self.step = step
        self.place = directory / "step"
        old = ["-m", "tests.support.held", step, str(self.place)] if step in OLD else ["-m", "nbdzram"]
        self.line = Line(directory, in_memory=in_memory, program=old)
        self.old = self.line.last
        self.log = (directory / "new.log").open("w+b")
        self.new: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Let the new one ask."""
        words = ["-e", f"disk={SIZE}", "-U", str(self.line.directory / "new.sock"), "--control", str(self.line.control)]
        words += ["--metrics", "off", *self.line.arguments]
        program = ["-m", "tests.support.held", self.step, str(self.place)] if self.step in NEW else ["-m", "nbdzram"]
        self.new = subprocess.Popen(
            [sys.executable, *program, "serve", "--takeover", *words],
            stdout=self.log,
            stderr=self.log,
            env=Nbdzram.environment(self.old),
        )

    def at_step(self, steps: socket.socket) -> socket.socket:
        """The connection of the one that is held, once it is there; what both said if one ends before, or never is."""
        assert self.new is not None
        with contextlib.ExitStack() as watched:
            ends = [os.pidfd_open(process.pid) for process in (self.old.process, self.new)]
            for end in ends:
                watched.callback(os.close, end)
            found = readable(steps.fileno(), *ends, seconds=START_SECONDS)
        said = f"{self.old.log}\n---\n{Path(self.log.name).read_text()}"
        assert steps.fileno() in found, (
            f"nobody came to {self.step!r} (old {self.old.process.poll()}, new {self.new.poll()}):\n{said}"
        )
        return steps.accept()[0]

    def is_at_rest(self) -> bool:
        """Whether every thread of the one that is held sleeps: what arrives wakes it at once."""
        assert self.new is not None
        tasks = Path(f"/proc/{self.new.pid if self.step in NEW else self.old.pid}/task")
        try:
            return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in tasks.iterdir())
        except (FileNotFoundError, ProcessLookupError):  # a thread ended in this moment: it is at rest soon
            return False

    def kill(self, victim: str) -> int:
        """-9; the number of the other process."""
        assert self.new is not None
        died, lives = (self.old.process, self.new) if victim == "old" else (self.new, self.old.process)
        died.kill()
        died.wait()
        return lives.pid

    def end(self) -> None:
        for process in filter(None, (self.old.process, self.new)):
            process.kill()
            process.wait()
        self.log.close()


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path, request.param[0], in_memory=request.param[1])
    yield made
    made.end()


def content(block: int) -> bytes:
    return block.to_bytes(2, "big") * (BLOCK // 2)


def server_there(held: Held) -> tuple[int, str]:
    """Who serves, once somebody does, and at which socket."""
    found: list[tuple[int, str]] = []

    def serves() -> bool:
        with contextlib.suppress(ServerUnreachable, ConnectionError), ControlClient(held.line.control) as control:
            status = control.status()
            if status.uris and not status.draining:
                found.append((status.pid, next(uri for uri in status.uris if "socket=" in uri)))
        return bool(found)

    deadline = itertools.count()
    while not serves():
        assert next(deadline) < START_SECONDS * 50, f"nobody serves:\n{held.old.log}\n{(held.log.name)}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            held.old.process.wait(0.02)
    return found[0]


@pytest.mark.parametrize(
    ("case", "victim"),
    [
        pytest.param(
            (step, in_memory),
            victim,
            id=f"{'memory' if in_memory else 'directory'}, {step}, {victim} killed".replace(" ", "-"),
            marks=[] if (step, victim) in QUICK else pytest.mark.slow,
        )
        for in_memory in (False, True)
        for step, victim in CASES
    ],
    indirect=["case"],
)
def test_one_of_the_two_serves_whoever_is_killed(case: Held, victim: str) -> None:
    with case.old.client() as writer:
        for block in range(WRITTEN):
            writer.write(block * BLOCK, content(block))
    whole = request(CMD_WRITE, WRITTEN * BLOCK, BLOCK, cookie=7) + content(WRITTEN)
    cut = len(whole) - BLOCK + HALF
    client = case.old.client()
    with client.socket, listening(case.place) as steps:
        client.socket.sendall(whole[:cut])
        case.begin()
        with case.at_step(steps) as held:
            client.socket.sendall(whole[cut:])
            case.old.wait_until(case.is_at_rest, START_SECONDS)  # whichever of the two would have read that has
            lives = case.kill(victim)
            held.shutdown(socket.SHUT_RDWR)
        pid, uri = server_there(case)
        assert pid == lives
        had_memory = victim == "new" or case.step not in NO_MEMORY_YET
        alive = True
        try:
            assert SIMPLE_REPLY.unpack(client.receive(SIMPLE_REPLY.size))[1:] == (0, 7)
            assert client.read(WRITTEN * BLOCK, BLOCK) == content(WRITTEN)
        except (ConnectionError, EOFError):
            alive = False
        assert alive or victim == "old", "its server lives, and hung up"
        with Client(Path(uri.partition("socket=")[2]), "disk") as reader:
            found = [reader.read(block * BLOCK, BLOCK) for block in range(WRITTEN)]
            if case.line.state or had_memory:
                assert found == [content(block) for block in range(WRITTEN)]
            else:  # gone with the process, whole
                assert found in ([bytes(BLOCK)] * WRITTEN, [content(block) for block in range(WRITTEN)])
            if alive:
                assert reader.read(WRITTEN * BLOCK, BLOCK) == content(WRITTEN)
            reader.write(0, b"n" * BLOCK)
            assert reader.read(0, BLOCK) == b"n" * BLOCK
