"""A start and a stop that go on are not cut by whoever supervises them, however much there is to read or to write."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.cli import going_on, loading
from nbdzram.config import ServerConfig
from nbdzram.server.service import Service
from tests.support.server import START_SECONDS, Nbdzram

MIB = 1 << 20
STORED = 16 * MIB  # which do not compress
FILE = "00000001-full.stream"


class Supervisor:
    """What systemd is to a unit of Type=notify."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.place))
        self._socket.settimeout(START_SECONDS)

    def hear(self, says: str) -> str:
        """The next message that says this."""
        while True:
            said = self._socket.recv(4096).decode()
            if re.search(says, said):
                return said

    def hear_barrier(self) -> int:
        """Of the next one the descriptor, which is closed once all before it has been read."""
        descriptors: list[int] = []
        while not descriptors:
            said, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 1)
        assert said == b"BARRIER=1"
        return descriptors[0]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.place))
    yield made
    made.close()


def seconds_more(said: str) -> float:
    (found,) = re.findall(r"^EXTEND_TIMEOUT_USEC=(\d+)$", said, re.MULTILINE)
    return int(found) / 1e6


def test_what_a_step_may_take_is_told_in_the_unit_that_the_name_has(supervisor: Supervisor) -> None:
    """A minute, and what each GiB takes; never a day, for which one that hangs would not be mended."""
    going_on._extend("stopping", 4 << 30, 10.0)
    assert supervisor.hear("") == f"STATUS=stopping\nEXTEND_TIMEOUT_USEC={(60 + 2 + 10) * 10**6}"
    assert loading.LOADING_SILENCE_MICROSECONDS == 300 * 10**6


def test_nobody_looks_how_far_it_is_once_it_is_done() -> None:
    async def story() -> None:
        async with going_on._told(lambda: "half", Service(ServerConfig(tcp=(), unix=()))):
            assert len(asyncio.all_tasks()) == 2
        await asyncio.sleep(0)  # the one that looked hears of it
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(story())


def test_who_is_taken_over_ends_once_it_is_read_who_serves(tmp_path: Path, supervisor: Supervisor) -> None:
    """The end of a process that nobody knows as a former one would be that of the service (sd_notify_barrier(3))."""
    arguments = ["--state-dir", str(tmp_path / "state")]
    with Nbdzram(tmp_path, {"disk": MIB}, arguments=arguments) as old:
        supervisor.hear("READY=1")
        words = [*old.command[old.command.index("serve") :], "--takeover"]
        with subprocess.Popen(
            [sys.executable, "-m", "nbdzram", *words], stdout=subprocess.DEVNULL, env=old.environment()
        ) as new:
            try:
                assert supervisor.hear("MAINPID=") == f"MAINPID={new.pid}"
                read = supervisor.hear_barrier()
                assert old.process.poll() is None
                os.close(read)
                assert old.process.wait(START_SECONDS) == 0
            finally:
                new.terminate()
        assert new.returncode == 0


def write(server: Nbdzram) -> None:
    with server.client() as client:
        for offset in range(0, STORED, MIB):
            client.write(offset, random.Random(offset).randbytes(MIB))


def test_a_start_that_reads_a_stream_has_time_as_long_as_more_comes(tmp_path: Path, supervisor: Supervisor) -> None:
    """Of hundreds of GiB it takes longer than the unit allows: it was cut, and began anew, for good."""
    (tmp_path / "first").mkdir()
    with Nbdzram(tmp_path / "first", {"disk": STORED}) as first:
        write(first)
        sending = [sys.executable, "-m", "nbdzram", "send", "--all", "--control", str(first.control)]
        stream = subprocess.run(sending, check=True, capture_output=True, env=first.environment()).stdout
    place = tmp_path / "stream"
    os.mkfifo(place)
    supervisor.hear("READY=1")
    words = ["serve", "--restore", str(place), "-U", str(tmp_path / "n.sock"), "--control", str(tmp_path / "c.sock")]
    with subprocess.Popen(
        [sys.executable, "-m", "nbdzram", *words, "--metrics", "off"], env=first.environment()
    ) as server:
        try:
            with place.open("wb") as pipe:
                pipe.write(stream[: len(stream) // 2])
                pipe.flush()
                said = supervisor.hear("STATUS=starting: .* stored")
                assert seconds_more(said) >= 60
                pipe.write(stream[len(stream) // 2 :])
            assert supervisor.hear("^STATUS=$|READY=1") == "STATUS="
            supervisor.hear("READY=1")
        finally:
            server.terminate()
    assert server.returncode == 0


def test_a_stop_that_writes_a_checkpoint_has_time_as_long_as_that_goes_on(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    """It was cut in the middle, and what was written since the one before was lost. Here the file is a pipe: how far
    the server gets is how much of it is read."""
    kept = tmp_path / "kept"
    arguments = ["--checkpoint", str(kept), "--checkpoint-interval", "1h"]
    server = Nbdzram(tmp_path, {"disk": STORED}, arguments=arguments)
    try:
        write(server)
        os.mkfifo((kept / FILE).with_suffix(".new"))
        server.process.send_signal(signal.SIGTERM)
        said = [supervisor.hear("STOPPING=1"), supervisor.hear("STATUS=stopping")]
        shares = []
        with (kept / FILE).with_suffix(".new").open("rb") as pipe:
            for _ in range(2):
                assert len(pipe.read(STORED // 3)) == STORED // 3
                said.append(supervisor.hear("STATUS=writing the last checkpoint"))
                shares.append(float(re.findall(r": ([\d.]+)%", said[-1])[0]))
            while pipe.read(MIB):
                pass
        assert seconds_more(said[1]) >= 60 + 10  # limits.drain_seconds
        assert shares[0] < shares[1]
        assert all(seconds_more(one) >= 60 for one in said[2:])
        supervisor.hear("STATUS=giving memory back")
        assert server.process.wait(START_SECONDS) == 0, server.log
    finally:
        server.kill()
