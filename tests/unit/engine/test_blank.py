"""Files in which nothing was stored yet, and those of which nobody can say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nbdzram.engine.arena import BEGUN, holds_nothing
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError
from tests.unit.engine.blocks import BLOCK, noise


@pytest.mark.parametrize("content", [b"", bytes(BLOCK), BEGUN + bytes(BLOCK)])
def test_what_a_start_begins_anew_holds_nothing_and_looking_leaves_it_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "arena"
    path.write_bytes(content)
    with path.open("rb") as file:
        assert holds_nothing(file.fileno())
    assert path.read_bytes() == content
    path.unlink()
    Pool(path=str(path)).close()
    with path.open("rb") as file:
        assert not holds_nothing(file.fileno())


def test_an_arena_of_which_nobody_can_say_whether_it_holds_something_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        pool.create("disk", 1 << 20).write(0, noise(1))
    before, seek = path.read_bytes(), os.lseek

    def fails(descriptor: int, position: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return seek(descriptor, position, whence)

    with monkeypatch.context() as patch, pytest.raises(ArenaError, match="cannot read the arena"):
        patch.setattr(os, "lseek", fails)
        Pool(path=str(path))
    assert path.read_bytes() == before
    with Pool(path=str(path)) as pool:
        assert pool.disks()[0].read(0, BLOCK) == noise(1)
