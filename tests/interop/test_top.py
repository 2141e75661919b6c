"""`nbdzram top` in a real terminal, of 80 columns and 24 lines, with tmux as the terminal."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.programs import require_program
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

SECONDS = 30
BLOCK = bytes(range(256)) * 16


class Terminal:
    """One tmux server of our own with one window, in which a shell runs `nbdzram top` and then tells its exit code."""

    def __init__(self, directory: Path, server: Nbdzram) -> None:
        self._tmux = [require_program("tmux", package="tmux"), "-S", str(directory / "tmux"), "-f", "/dev/null"]
        top = shlex.join([sys.executable, "-m", "nbdzram", "top", "--control", str(server.control)])
        line = f"{top}; echo ended with $?; exec cat"
        environment = server.environment() | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        subprocess.run(
            [*self._tmux, "-u", "new-session", "-d", "-x", "80", "-y", "24", line], check=True, env=environment
        )

    def text(self) -> str:
        shot = [*self._tmux, "capture-pane", "-p"]
        return subprocess.run(shot, capture_output=True, text=True, check=True).stdout

    def press(self, key: str) -> None:
        subprocess.run([*self._tmux, "send-keys", key], check=True)

    def wait_for(self, told: str) -> None:
        deadline = time.monotonic() + SECONDS
        while told not in (text := self.text()):
            assert time.monotonic() < deadline, f"no {told!r} within {SECONDS} s in:\n{text}"

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=True)


@pytest.fixture
def open_top(tmp_path: Path) -> Iterator[Callable[[Nbdzram], Terminal]]:
    terminals: list[Terminal] = []

    def start(server: Nbdzram) -> Terminal:
        terminals.append(Terminal(tmp_path, server))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("key", ["q", "C-c"])
def test_the_view_is_live_and_a_key_ends_it(server: Nbdzram, open_top: Callable[[Nbdzram], Terminal], key: str) -> None:
    terminal = open_top(server)
    terminal.wait_for("q quit")
    assert "0 connections" in terminal.text()
    with server.client() as client:
        client.write(0, BLOCK * 64)
        terminal.wait_for("1 connection ")
        terminal.wait_for("stored 256K")
    terminal.press("s")
    terminal.wait_for("sort: requests")
    terminal.press(key)
    terminal.wait_for("ended with 0")
    assert "EXPORT" not in terminal.text()  # the screen is what it was before


def test_a_server_that_ends_leaves_a_clean_terminal_and_one_sentence(
    server: Nbdzram, open_top: Callable[[Nbdzram], Terminal]
) -> None:
    terminal = open_top(server)
    terminal.wait_for("q quit")
    server.process.terminate()
    server.process.wait(timeout=SECONDS)
    terminal.wait_for("ended with 3")
    text = terminal.text()
    assert "went away" in text
    assert "Traceback" not in text


def test_in_a_pipe_it_prints_once_and_ends(server: Nbdzram) -> None:
    printed = server.command_line("top", "--interval", "0.1").stdout
    assert printed.startswith("nbdzram ")
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["EXPORT", "disk"]
