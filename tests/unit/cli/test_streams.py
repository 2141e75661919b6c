"""Standard streams that are closed, full, or not a terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable
from nbdzram.stream.layout import MAGIC
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment

Start = Callable[..., Server]

FULL = Path("/dev/full")


@pytest.mark.parametrize("words", [["--help"], ["doctor"], ["completion", "bash"], ["serve", "--check-config"]])
def test_a_full_disk_below_the_output_is_one_sentence(words: list[str]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [*NBDZRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=clean_environment()
        )
    assert done.returncode == 1
    assert done.stderr == (
        "nbdzram: cannot write the output: No space left on device; free some space, or send it elsewhere\n"
    )


CLOSED = "nbdzram: cannot write the output: Bad file descriptor; free some space, or send it elsewhere\n"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("stat >&-", 1, CLOSED),
        ("ls --json >&-", 1, CLOSED),
        ("send disk >&-", 1, CLOSED),
        ("--help >&-", 1, CLOSED),
        ("stat >&- <&- 2>&-", 1, ""),
        ("stat nothing 2>/dev/full", 4, ""),
        ("nothing 2>/dev/full", 2, ""),
        ("stat >/dev/full 2>/dev/full", 1, ""),
        ("send disk 2>&-", 0, ""),
    ],
)
def test_what_cannot_be_said_is_one_sentence_where_there_is_room_and_the_code_says_it_anywhere(
    start: Start, line: str, code: int, said: str
) -> None:
    server = start("-e", "disk=1M")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {line}', "sh", *NBDZRAM],
        capture_output=True,
        check=False,
        env=clean_environment() | {"NBDZRAM_CONTROL": str(server.control)},
    )
    assert (done.returncode, done.stderr.decode()) == (code, said)
    assert done.stdout.startswith(MAGIC) is (line == "send disk 2>&-")


@pytest.mark.parametrize(
    ("line", "clue"),
    [
        ("send disk > /dev/full", "cannot write the output: No space left on device"),
        ("receive 0> /dev/null", "cannot read the stream from standard input: Bad file descriptor"),
    ],
)
def test_an_error_at_our_end_of_a_stream_is_not_a_server_that_went_away(start: Start, line: str, clue: str) -> None:
    server = start("-e", "disk=1M")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {line}', "sh", *NBDZRAM],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment() | {"NBDZRAM_CONTROL": str(server.control)},
    )
    assert (done.returncode, clue in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("standard_output", [">&-", ">/dev/full", "<&- >&-", "| true"])
def test_a_server_whose_greeting_nobody_can_read_serves(tmp_path: Path, standard_output: str) -> None:
    """And its sockets do not become its standard output: uvloop ends the process when it closes such a one."""
    control = tmp_path / "control.sock"
    words = ["serve", "-e", "disk=1M", "-U", str(tmp_path / "nbd.sock"), "--metrics", "off", "--control", str(control)]
    with subprocess.Popen(
        ["sh", "-c", f'"$@" {standard_output}', "sh", *NBDZRAM, *words],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    ) as shell:
        try:
            os.kill(pid_of_server(control, shell), signal.SIGTERM)
            _, errors = shell.communicate(timeout=60)
        except BaseException:
            os.killpg(shell.pid, signal.SIGKILL)
            raise
    assert shell.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Assertion" not in errors


def pid_of_server(control: Path, shell: subprocess.Popen[str]) -> int:
    """Asks until the server offers its disk."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert shell.poll() is None
        try:
            with ControlClient(control) as client:
                status = client.status()
        except ServerUnreachable:
            os.sched_yield()
            continue
        if status.uris:
            return status.pid
    raise AssertionError("the server offers nothing")


def test_a_client_that_hangs_up_during_a_run_leaves_nothing_in_the_log(start: Start) -> None:
    server = start("-e", "disk=64M")
    with Client(server.socket, "disk") as client:
        for number in range(16):
            client.write(number << 20, (b"%08d" % number * 512).ljust(4096) * 256)
            client.write((number << 20) + 8, b"other")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(server.control))
        raw.sendall(b'{"jsonrpc":"2.0","method":"run","params":{"kind":"check","cpu_percent":1},"id":1}\n')
    with ControlClient(server.control) as control:
        while control.status().pools[0].maintenance.totals["check"].runs == 0:
            os.sched_yield()
    assert server.stop() == 0
    assert server.log.read_text().count("Traceback") == 0


def test_colours_are_for_terminals_that_want_them() -> None:
    """https://no-color.org: a variable that is there and not empty."""
    for told, coloured in (("", True), ("1", False)):
        environment = clean_environment() | {"NO_COLOR": told, "TERM": "xterm"}
        words = f"{sys.executable} -m nbdzram doctor"
        done = subprocess.run(["script", "-qec", words, "/dev/null"], capture_output=True, check=False, env=environment)
        assert (b"\x1b[" in done.stdout) == coloured
