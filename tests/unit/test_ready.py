"""Waiting for descriptors (nbdzram.ready)."""

from __future__ import annotations

import fcntl
import os
import resource
import select
from collections.abc import Iterator

import pytest

from nbdzram.ready import readable, writable

SELECT_TAKES = 1024
"""Descriptors below this are those that select(2) can name (FD_SETSIZE)."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its ends, with numbers that select(2) does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * SELECT_TAKES:
        pytest.skip(f"this process may have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * SELECT_TAKES), hard))
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, SELECT_TAKES) for end in low)
    for end in low:
        os.close(end)
    yield high[0], high[1]
    for end in high:
        os.close(end)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_descriptor_with_a_high_number_is_waited_for(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    assert readable(reads, seconds=0) == set()
    assert writable(writes, seconds=0)
    os.write(writes, b"x")
    assert readable(reads) == {reads}


def test_a_full_pipe_takes_nothing(pipe: tuple[int, int]) -> None:
    _, writes = pipe
    os.set_blocking(writes, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writes, bytes(65536))
    assert not writable(writes, seconds=0)


def test_a_pipe_at_its_end_is_ready(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    spare = os.open(os.devnull, os.O_WRONLY)
    os.dup2(spare, writes)  # closes the pipe's end, and leaves the number to the fixture
    os.close(spare)
    assert readable(reads) == {reads}


def test_of_several_those_that_are_ready_are_told(pipe: tuple[int, int]) -> None:
    other, far = os.pipe()
    try:
        os.write(pipe[1], b"x")
        assert readable(pipe[0], other, seconds=60) == {pipe[0]}
        assert readable(seconds=-1) == set()
    finally:
        os.close(other)
        os.close(far)


@pytest.mark.parametrize(
    ("seconds", "asked"),
    [(None, None), (0, 0), (-1.5, 0), (1e-9, 1), (0.0004, 1), (0.001, 1), (0.0011, 2), (2.5, 2500)],
)
def test_what_is_waited_for_is_never_less_than_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, asked: int | None
) -> None:
    """The system counts in milliseconds: a time below one that became none would be asked for again and again."""
    told: list[int | None] = []

    class Poll:
        def register(self, *_: int) -> None:
            pass

        def poll(self, milliseconds: int | None) -> list[tuple[int, int]]:
            told.append(milliseconds)
            return []

    monkeypatch.setattr(select, "poll", Poll)
    assert readable(0, seconds=seconds) == set()
    assert told == [asked]
