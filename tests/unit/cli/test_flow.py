"""How far a stream has come, told on a terminal now and then, and nowhere else."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdzram.cli import flow
from nbdzram.cli.main import run
from tests.unit.cli.conftest import NBDZRAM
from tests.unit.cli.told import serving


class Screen(io.StringIO):
    """Standard error that is a terminal, or none."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_what_has_passed_and_how_fast_is_told_twice_a_second(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    screen, now = Screen(terminal=terminal), [100.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("nbdzram.cli.flow.time.monotonic", lambda: now[0])
    with flow.Meter("sent") as meter:
        for seconds in (0.25, 0.5, 0.75, 4.0):
            now[0] = 100.0 + seconds
            meter.passed(3 << 20)
    told = ["sent 6M, 12M/s", "sent 12M, 3M/s", ""]
    assert screen.getvalue() == ("".join(flow.CLEAR + line for line in told) if terminal else "")


def test_all_that_was_sent_is_in_the_file_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python still has at hand would be written behind it."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    path = tmp_path / "stream"
    with serving() as (control, _), path.open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run(["--control", str(control), "send", "disk"]) == 0
        assert synced == [len(b"a stream\n")]
    assert path.read_bytes() == b"a stream\n"


@pytest.mark.parametrize("words", ["stat", "exports list --json", "version"])
def test_a_command_whose_reader_has_left_is_ended_by_that_as_other_tools_are(words: str) -> None:
    """`nbdzram stat | head`: without a word, and with the status that a shell knows."""
    reads, writes = os.pipe()
    os.close(reads)
    with serving() as (control, _), os.fdopen(writes) as out:
        command = [*NBDZRAM, "--control", str(control), *words.split()]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
