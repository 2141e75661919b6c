"""`nbdzram top` in a real terminal, of 80 columns and 24 lines, with tmux as the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdzram.cli.view import SORTS
from tests.support.server import Nbdzram
from tests.support.terminal import SECONDS, Terminal

pytestmark = pytest.mark.interop

BLOCK = bytes(range(256)) * 16


@pytest.fixture
def open_top(tmp_path: Path) -> Iterator[Callable[[Nbdzram], Terminal]]:
    terminals: list[Terminal] = []

    def start(server: Nbdzram) -> Terminal:
        top = [sys.executable, "-m", "nbdzram", "top", "--control", str(server.control)]
        terminals.append(Terminal(tmp_path, top, server.environment()))
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
    orders = list(SORTS)
    for shown in (*orders[1:], *orders[:2]):
        terminal.press("s")
        terminal.wait_for(f"sort: {shown}")
    terminal.press(key)
    terminal.wait_for("ended with 0")
    assert "EXPORT" not in terminal.text()  # the screen is what it was before


def test_ctrl_z_leaves_the_view_and_who_comes_back_finds_it(server: Nbdzram, tmp_path: Path) -> None:
    """It stayed on the screen, over what the shell said, and no key was heard after it."""
    terminal = Terminal(tmp_path, ["bash", "--norc", "--noprofile", "-i"], server.environment())
    try:
        terminal.press(f"{sys.executable} -m nbdzram top --control {server.control}", "Enter")
        for _ in range(2):
            terminal.wait_for("q quit")
            terminal.press("C-z")
            terminal.wait_for("Stopped")
            terminal.press("stty -a | grep -c -e '-icanon' -e '-echo '; echo twice $((1 + 1))", "Enter")
            terminal.wait_for("twice 2")
            assert "q quit" not in terminal.text()
            assert "\n0\ntwice 2" in terminal.text()
            terminal.press("clear; fg; echo left with $?", "Enter")
        terminal.wait_for("q quit")
        terminal.press("q")
        terminal.wait_for("left with 0")
    finally:
        terminal.close()


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
