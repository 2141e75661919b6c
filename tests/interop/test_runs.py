"""Maintenance runs as their operator sees them: a long one is seen, held, ended; who waits knows for what."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Nbdzram
from tests.support.terminal import Terminal

pytestmark = pytest.mark.interop

SECONDS = 60
BLOCKS = 1024  # some slices of 256, and between two of them a pause of a minute at 1 % of a core
LONG = ("recompress", "--level", "19", "--cpu", "1")


@pytest.fixture
def busy(server: Nbdzram) -> Nbdzram:
    """A server with blocks that recompression takes seconds for."""
    choose = random.Random(1)
    words = [choose.randbytes(8) for _ in range(1000)]
    with server.client() as client:
        for number in range(0, BLOCKS, 64):
            client.write(number * 4096, b"".join(choose.choice(words) for _ in range(32 * 1024)))
    return server


def runs(server: Nbdzram) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(server.command_line("runs", "--json").stdout)
    return found


def states(server: Nbdzram) -> dict[int, str]:
    return {run["number"]: run["state"] for run in runs(server)}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline


def begin(server: Nbdzram, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nbdzram", *words, "--control", str(server.control)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=server.environment(),
    )


def test_ctrl_c_says_that_the_run_goes_on_and_how_to_end_it(busy: Nbdzram) -> None:
    waiting = begin(busy, *LONG)
    wait_until(lambda: any(run["seconds"] > 1 for run in runs(busy)))  # it was told of its run ten times by then
    waiting.send_signal(signal.SIGINT)
    _, told = waiting.communicate(timeout=SECONDS)
    assert waiting.returncode == 130
    end = f"nbdzram runs cancel 1 --control {busy.control}"
    assert (
        f"run 1 (recompress of the pool default) goes on in the server; `nbdzram runs --control {busy.control}`" in told
    )
    assert f"`{end}` ends it" in told
    assert states(busy) == {1: "running"}
    assert busy.command_line("runs", "cancel", "1").stdout.startswith(
        "run 1 (recompress of the pool default) is cancelled"
    )
    wait_until(lambda: states(busy) == {1: "cancelled"})
    assert busy.fold()


def test_who_waits_is_told_for_what_and_is_served_when_that_is_cancelled(busy: Nbdzram) -> None:
    first = begin(busy, *LONG)
    wait_until(lambda: states(busy) == {1: "running"})
    second = begin(busy, "fold")
    assert second.stderr is not None
    said = second.stderr.readline()  # at once, and not when it is over
    assert said.startswith("run 2 (fold of the pool default) waits for run 1 (recompress of the pool default): ")
    assert [(run["kind"], run["state"]) for run in runs(busy)] == [("recompress", "running"), ("fold", "waiting")]
    listed = busy.command_line("runs").stdout.splitlines()
    assert listed[0].split() == ["RUN", "KIND", "POOL", "STATE", "DONE", "TOOK", "LEFT", "REASON", "ERROR"]
    assert [line.split()[:4] for line in listed[1:]] == [
        ["1", "recompress", "default", "running"],
        ["2", "fold", "default", "waiting"],
    ]
    assert busy.command_line("runs", "cancel", "1").returncode == 0
    out, _ = second.communicate(timeout=SECONDS)
    assert (second.returncode, out.startswith("fold of pool default: ")) == (0, True)
    _, told = first.communicate(timeout=SECONDS)
    assert first.returncode == 130
    assert "run 1 (recompress of the pool 'default') was cancelled; what it did until then stays" in told


def test_a_paused_run_waits_for_its_operator_and_a_resumed_one_comes_to_its_end(server: Nbdzram) -> None:
    with server.client() as client:
        client.write(0, bytes(range(256)) * 4096)
    check = begin(server, "check", "--cpu", "1")
    wait_until(lambda: states(server) == {1: "running"} or check.poll() is not None)
    paused = server.command_line("runs", "pause", "1", check=False)
    if check.poll() is None or paused.returncode == 0:  # it may have ended before
        assert states(server)[1] in {"paused", "done"}
        refused = server.command_line("runs", "pause", "1", check=False)
        assert refused.returncode == 1
        server.command_line("runs", "resume", "1", check=False)
    out, _ = check.communicate(timeout=SECONDS)
    assert (check.returncode, out.startswith("check of pool default: ")) == (0, True)


def test_what_cannot_be_cancelled_is_one_sentence_with_what_can(busy: Nbdzram) -> None:
    none = busy.command_line("runs", "cancel", "9", check=False)
    assert (none.returncode, none.stderr) == (
        1,
        "nbdzram: run 9 neither waits nor runs; none does, and `nbdzram runs` shows them\n",
    )
    assert busy.command_line("runs").stdout == "no run waits, is under way, or ended since the server started\n"
    left = begin(busy, *LONG)
    wait_until(lambda: states(busy) == {1: "running"})
    wrong = busy.command_line("runs", "resume", "1", check=False)
    assert "run 1 (recompress of the pool 'default') is running; only a paused one can be resumed" in wrong.stderr
    other = busy.command_line("runs", "cancel", "2", check=False)
    assert "the runs that do are 1" in other.stderr
    left.terminate()
    left.communicate(timeout=SECONDS)


def test_of_several_runs_none_is_ended_or_held_where_one_cannot_be(busy: Nbdzram) -> None:
    left = [begin(busy, *LONG)]
    wait_until(lambda: "running" in states(busy).values())  # a check that came first would be done in no time
    left.append(begin(busy, "check"))
    wait_until(lambda: sorted(states(busy).values()) == ["running", "waiting"])
    before = states(busy)
    (running,) = (number for number, state in before.items() if state == "running")
    (waiting,) = before.keys() - {running}
    for verb, numbers, told in (
        ("cancel", (running, 99), "run 99 is not there"),
        ("pause", (running, waiting), f"run {waiting} is waiting"),
        ("resume", (running, waiting, 98), f"run {running} is running; run {waiting} is waiting; run 98 is not there"),
    ):
        for flags in ((), ("--json",)):
            done = busy.command_line("runs", verb, *map(str, numbers), *flags, check=False)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"nbdzram: {told}: nothing is done; `nbdzram runs` shows them\n"
            assert states(busy) == before
    ended = busy.command_line("runs", "cancel", str(waiting), str(running), str(waiting)).stdout.splitlines()
    assert [line.split(",")[0].split()[-1] for line in ended] == ["cancelled", "cancelled"]
    again = busy.command_line("runs", "cancel", str(waiting), str(running), check=False)
    assert f"run {waiting} is cancelled; run {running} is cancelled: nothing is done" in again.stderr
    for one in left:
        one.communicate(timeout=SECONDS)


@pytest.fixture
def terminal(tmp_path: Path, busy: Nbdzram) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "nbdzram", *LONG, "--control", str(busy.control)]
    opened = Terminal(tmp_path, command, busy.environment(), width=200)  # no question is broken there at its end
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("keys", "state"), [(("y", "Enter"), "cancelled"), (("n", "Enter"), "running"), (("C-c",), "running")]
)
def test_on_a_terminal_ctrl_c_asks_whether_the_run_shall_end_too(
    busy: Nbdzram, terminal: Terminal, keys: tuple[str, ...], state: str
) -> None:
    terminal.wait_for("recompress default")
    terminal.press("C-c")
    terminal.wait_for("in the server")
    terminal.wait_for("Cancel it? [y/N]")
    terminal.press(*keys)
    terminal.wait_for("ended with 130")
    wait_until(lambda: states(busy)[1] == state)
    assert ("runs cancel 1" in terminal.text()) == (state == "running")
    assert "^Crun" not in terminal.text()  # behind the question


def test_on_a_terminal_who_stops_waiting_is_told_what_the_run_waits_for(busy: Nbdzram, tmp_path: Path) -> None:
    first = begin(busy, *LONG)
    wait_until(lambda: states(busy) == {1: "running"})
    command = [sys.executable, "-m", "nbdzram", "fold", "--control", str(busy.control)]
    terminal = Terminal(tmp_path, command, busy.environment())
    try:
        terminal.wait_for("waits for run 1")
        terminal.press("C-c")
        terminal.wait_for("run 2 (fold of the pool default) waits in the server for run 1 (recompress of the pool")
        terminal.wait_for("Cancel it? [y/N]")
        terminal.press("y", "Enter")
        terminal.wait_for("cancelled run 2; it had not begun")
    finally:
        terminal.close()
    assert states(busy) == {1: "running", 2: "cancelled"}
    busy.command_line("runs", "cancel", "1")
    first.communicate(timeout=SECONDS)


def test_a_question_that_the_end_of_its_run_overtakes_goes_away_and_says_what_came_of_it(
    busy: Nbdzram, terminal: Terminal, tmp_path: Path
) -> None:
    """It stayed, and whoever said yes was told that a run which is done cannot be cancelled."""
    terminal.wait_for("recompress default")
    second = tmp_path / "second"
    second.mkdir()
    command = [sys.executable, "-m", "nbdzram", "fold", "--control", str(busy.control)]
    behind = Terminal(second, command, busy.environment())
    try:
        behind.wait_for("waits for run 1")
        for asked in (terminal, behind):
            asked.press("C-c")
            asked.wait_for("Cancel it? [y/N]")
        behind.press("y")  # and no Enter: nobody's answer, and no command for the shell
        busy.command_line("runs", "cancel", "1")
        terminal.wait_for("run 1 (recompress of the pool default) was cancelled meanwhile; what it did until then")
        behind.wait_for("run 2 (fold of the pool default) has ended meanwhile: nothing to do in 0.0")
        for asked in (terminal, behind):
            asked.wait_for("ended with 130")
        behind.press("z", "Enter")
        behind.wait_for("\nz\nz\n")  # as it is typed, and as who comes next has it: without what was typed before
    finally:
        behind.close()
    assert states(busy) == {1: "cancelled", 2: "done"}


def test_what_is_no_answer_is_asked_again(busy: Nbdzram, terminal: Terminal) -> None:
    terminal.wait_for("recompress default")
    terminal.press("C-c")
    terminal.wait_for("Cancel it? [y/N]")
    terminal.press("x", "Enter")
    terminal.wait_for("Error: invalid input")
    terminal.press("C-d")
    terminal.wait_for("ended with 130")
    assert states(busy) == {1: "running"}


def test_a_control_socket_may_be_named_before_the_command(server: Nbdzram) -> None:
    command = [sys.executable, "-m", "nbdzram", "--control", str(server.control), "stat", "-n", "-o", "NAME"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=server.environment())
    assert done.stdout.split() == ["default", "disk"]
