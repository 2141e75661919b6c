"""What no program of this format writes, though every check agrees with it: it is refused, or let go of."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError, CheckFailed
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random

LARGEST = 1 << 60
SIZE_AT = 8  # in a head
UNKNOWN_KINDS = range(8, 14)
BLOCKS = 10


def filled(path: Path) -> None:
    with Pool(path=str(path)) as pool:
        pool.create("disk", BLOCKS * BLOCK).write(0, half_random(1))


@pytest.mark.parametrize("size", [(1 << 51) + 1, LARGEST, (1 << 64) - 1])
def test_a_size_that_no_table_can_hold_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "arena"
    filled(path)
    view = bytearray(path.read_bytes())
    Arena(view).forge_head(0, SIZE_AT, size)
    path.write_bytes(view)
    with pytest.raises(ArenaError, match="the size of export number 0 cannot be one"):
        Pool(path=str(path))
    assert path.read_bytes() == view


@pytest.mark.parametrize("kind", UNKNOWN_KINDS)
def test_an_object_of_a_codec_that_there_is_not_is_refused(tmp_path: Path, kind: int) -> None:
    """It is the number of a decoder in a row of them: nobody looks behind its end."""
    path = tmp_path / "arena"
    filled(path)
    view = bytearray(path.read_bytes())
    arena = Arena(view)
    arena.set_word(arena.cell(1), arena.word(arena.cell(1)) & ~15 | kind)
    path.write_bytes(view)
    with pytest.raises(ArenaError, match=f"handle 1 leads to handle 1, of kind {kind}, which there is not"):
        Pool(path=str(path))
    assert path.read_bytes() == view


@pytest.mark.parametrize("block", [BLOCKS, BLOCKS + 1, 511])
def test_a_block_behind_the_end_is_a_fault_and_goes_when_its_arena_is_opened(tmp_path: Path, block: int) -> None:
    path = tmp_path / "arena"
    filled(path)
    with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        pool.check()
        Arena(view).forge_same(block, 7)
        with pytest.raises(CheckFailed, match="export number 0 stores a block behind its end"):
            pool.check()
    with Pool(path=str(path)) as pool:
        pool.check()
        (disk,) = pool.disks()
        assert disk.stats().stored == BLOCK
        disk.resize(512 * BLOCK)
        assert disk.read(0, 512 * BLOCK) == half_random(1).ljust(512 * BLOCK, b"\0")
