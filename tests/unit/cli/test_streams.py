"""Standard streams that are closed, full, or not a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable
from tests.unit.cli.conftest import NBDZRAM, clean_environment

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


def test_colours_are_for_terminals_that_want_them() -> None:
    """https://no-color.org: a variable that is there and not empty."""
    for told, coloured in (("", True), ("1", False)):
        environment = clean_environment() | {"NO_COLOR": told, "TERM": "xterm"}
        words = f"{sys.executable} -m nbdzram doctor"
        done = subprocess.run(["script", "-qec", words, "/dev/null"], capture_output=True, check=False, env=environment)
        assert (b"\x1b[" in done.stdout) == coloured
