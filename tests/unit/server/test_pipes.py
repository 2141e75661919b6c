"""A pipe in the place of what a server notes beside its checkpoints: nobody waits for its other end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.server.state import FILE_NAME, Noted, note_in


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
