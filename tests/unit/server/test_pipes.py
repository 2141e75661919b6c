"""A pipe in the place of a file of the directory of checkpoints: nobody waits for its other end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.server.chains import checkpoints_in, segments_in, unfinished_in
from nbdzram.server.state import FILE_NAME, Noted, note_in
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import as_the_power_left_it, begun_from, disk, flushing, journal, of, play


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Whoever waits for a pipe in here fails."""

    def fail(*_: object) -> None:
        raise AssertionError("it waits for the other end of a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["00000001-full.stream", "00000001.journal"])
def test_a_pipe_that_is_called_as_what_a_start_reads_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe"):
        (checkpoints_in if name.endswith(".stream") else segments_in)(tmp_path)

    async def story() -> None:
        async with flushing(tmp_path):
            pass

    with pytest.raises(UserError, match=f"{name} is a pipe, and no file; move it away"):
        play(story)


@pytest.mark.parametrize("name", ["00000001-full.new", "00000002-since-00000001.new", "00000001.new", "00000002.new"])
def test_a_pipe_that_is_called_as_what_is_written_goes(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    os.mkfifo(kept / name)
    assert unfinished_in(kept) == [kept / name]

    async def story() -> None:
        async with flushing(kept) as service:
            assert not (kept / name).exists()
            os.mkfifo(kept / name)
            disk(service).write(BLOCK, text(1))
            await of(service).take()
            disk(service).write(0, text(0))
            await journal(service).synced()
            left = as_the_power_left_it(kept, tmp_path / "left")
        assert (await begun_from(left))[: 2 * BLOCK] == text(0) + text(1)

    play(story)


def test_a_pipe_that_is_called_as_what_is_damaged_is_nobodys_business(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "00000001-full.damaged")

    async def story() -> None:
        async with flushing(tmp_path, begun=False) as service:
            await of(service).take()
            assert journal(service).status.usable

    play(story)


def test_what_is_noted_waits_for_no_reader_of_a_pipe(tmp_path: Path) -> None:
    fresh = tmp_path / FILE_NAME.replace(".json", ".new")
    os.mkfifo(fresh)
    with bounded(), pytest.raises(OSError, match="No such device or address"):
        note_in(tmp_path, Noted())
    assert not fresh.exists()
    os.mkfifo(tmp_path / FILE_NAME)
    with bounded():
        note_in(tmp_path, Noted())
    assert (tmp_path / FILE_NAME).is_file()
