"""A start reads files, devices and pipes, and whoever stops it waits for none of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.server.source import open_source


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_that_has_no_writer_yet_is_read_to_the_end_of_the_one_that_comes(pipe: Path) -> None:
    with open_source(pipe, threading.Event()) as source:
        writer = threading.Thread(target=pipe.write_bytes, args=(b"all of it" * 100_000,))
        writer.start()
        assert source.read() == b"all of it" * 100_000
        writer.join()


def test_a_pipe_that_nobody_writes_to_is_waited_for_until_a_stop(pipe: Path) -> None:
    told = threading.Event()
    with open_source(pipe, told) as source:
        threading.Timer(0.01, told.set).start()
        with pytest.raises(UserError, match=rf"reading {pipe} was interrupted; nothing of it is kept"):
            source.read(1)


def test_of_a_file_nothing_more_is_read_behind_a_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    told = threading.Event()
    with open_source(tmp_path / "file", told) as source:
        assert len(source.read(2 << 20)) == 2 << 20
        told.set()
        with pytest.raises(UserError, match="was interrupted"):
            source.read()


def test_its_descriptor_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_source(tmp_path / "file", threading.Event()) as source:
        assert source.read() == b"1"
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before
