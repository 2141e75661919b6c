"""A keeper's voice: what it says may have to wait, and it never does."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from nbdzram.cli import voice
from nbdzram.cli.voice import LINES_MAX, Voice

SMALLEST_PIPE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """One that is full: a write to it waits until somebody reads."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    os.write(writer, b"." * SMALLEST_PIPE)
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def test_a_line_that_nobody_reads_keeps_nobody_waiting_and_comes_in_its_order(pipe: tuple[int, int]) -> None:
    """A journal on the disk that is being connected again reads nothing until it is."""
    reader, writer = pipe
    with Voice(writer) as speaking:
        for number in range(LINES_MAX):
            speaking.say(f"line {number}")
        os.read(reader, SMALLEST_PIPE)
        told = b""
        while told.count(b"\n") < LINES_MAX:
            told += os.read(reader, SMALLEST_PIPE)
    assert told.decode().splitlines() == [f"line {number}" for number in range(LINES_MAX)]


def test_what_nobody_has_read_for_long_is_left_out(pipe: tuple[int, int]) -> None:
    """Memory for lines is bounded; what is said once somebody reads again is told again."""
    reader, writer = pipe
    with Voice(writer) as speaking:
        for number in range(3 * LINES_MAX):
            speaking.say(f"line {number}")
        os.read(reader, SMALLEST_PIPE)
        told = b""
        while b"heard again" not in told:
            speaking.say("heard again")
            told += os.read(reader, SMALLEST_PIPE)
    lines = [line for line in told.decode().splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(len(lines))]
    assert len(lines) <= LINES_MAX + 1, "the thread stood in one"


def test_an_end_waits_for_a_listener_that_is_slow_and_not_for_one_that_is_none(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voice, "ENDING_SECONDS", 0.01)
    with Voice(pipe[1]) as speaking:
        speaking.say("to nobody")
    os.read(pipe[0], SMALLEST_PIPE)
    assert os.read(pipe[0], SMALLEST_PIPE) == b"to nobody\n"


def test_a_listener_that_is_gone_ends_nobody() -> None:
    """The reader's end is closed: a write is an error, and the next line is tried all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    with Voice(writer) as speaking:
        speaking.say("to nobody")
        speaking.say("to nobody either")
    os.close(writer)


def test_all_that_was_said_is_written_when_it_ends() -> None:
    reader, writer = os.pipe()
    with Voice(writer) as speaking:
        speaking.say("the last words, ä")
    os.close(writer)
    assert os.read(reader, 100) == "the last words, ä\n".encode()
    os.close(reader)
