"""The directory of checkpoints is had before anything there is read, and until the server has ended."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.server import opening
from nbdzram.server.claim import Claim
from nbdzram.server.state import Noted, noted_in
from tests.unit.server.lasting import checkpointing, play


def before_it_is_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]) -> None:
    def look(directory: Path) -> Noted:
        act(directory)
        return noted_in(directory)

    monkeypatch.setattr(opening, "noted_in", look)


def start(directory: Path) -> None:
    async def story() -> None:
        async with checkpointing(directory):
            pass

    play(story)


def take(directory: Path) -> None:
    """Raises UserError."""
    claim = Claim(directory)
    claim.take()
    claim.release()


def test_nobody_else_has_the_directory_when_what_is_noted_there_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would note what its clients' administrator said, and end, and the other would go on from what was before."""
    refused: list[str] = []

    def try_it(directory: Path) -> None:
        try:
            take(directory)
        except UserError as error:
            refused.append(str(error))

    before_it_is_read(monkeypatch, try_it)
    start(tmp_path / "kept")
    assert len(refused) == 1
    assert "another server keeps its checkpoints in" in refused[0]


def test_a_start_waits_for_a_server_that_is_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And behind one that is refused the directory is free."""
    other = Claim(tmp_path / "kept")
    other.take()
    with monkeypatch.context() as patch:
        patch.setattr(opening, "IN_USE_SECONDS", 0.0)
        with pytest.raises(UserError, match="another server keeps its checkpoints in"):
            start(tmp_path / "kept")
    monkeypatch.setattr("time.sleep", lambda _: other.release())
    start(tmp_path / "kept")
    take(tmp_path / "kept")


def test_a_start_that_cannot_read_what_is_noted_lets_the_directory_go(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "changes.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        start(tmp_path / "kept")
    take(tmp_path / "kept")


def test_what_is_mounted_while_a_start_reads_is_not_begun_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move_away(directory: Path) -> None:
        directory.rename(tmp_path / "before")
        directory.mkdir()

    before_it_is_read(monkeypatch, move_away)
    with pytest.raises(UserError, match="is another directory than a moment before"):
        start(tmp_path / "kept")


def test_a_file_system_without_locks_keeps_nobody_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    claims = [Claim(tmp_path), Claim(tmp_path)]
    for claim in claims:
        assert claim.take()
        claim.release()
    assert caplog.text.count(f"the file system of {tmp_path} has no locks (No locks available)") == 2
