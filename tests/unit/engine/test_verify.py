"""What is read is what was written, or an error of that block; and nothing makes rot true."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdzram.engine import moment
from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.walk import Told, Walk
from nbdzram.errors import CheckFailed, EngineError
from tests.support.arena import SEGMENTS_AT, Arena
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

FIRST_RANDOM = 8  # a byte of an LZ4 object of half_random, or of noise, that is a literal


@contextmanager
def rotten(path: Path, content: bytes, *, verify: bool = True) -> Iterator[Pool]:
    """A pool in use whose first block's object has one bit changed; a second block is sound."""
    with Pool(path=str(path), verify=verify) as pool:
        disk = pool.create("disk", 16 << 20)
        disk.write(0, content)
        disk.write(BLOCK, half_random(5000, 1000))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            place = arena.object_of(1)
            arena.set_word(place + FIRST_RANDOM, arena.word(place + FIRST_RANDOM) ^ 1 << 20)
            yield pool


CONTENTS = {"lz4": half_random(1), "raw": noise(1)}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_flipped_bit_is_an_error_of_its_block_alone_counted_and_named(tmp_path: Path, kind: str) -> None:
    with rotten(tmp_path / "arena", CONTENTS[kind]) as pool:
        (disk,) = pool.disks()
        for offset, length in ((0, BLOCK), (100, 8), (0, 2 * BLOCK)):
            with pytest.raises(EngineError, match="is not what was written"):
                disk.read(offset, length)
        assert disk.read(BLOCK, BLOCK) == half_random(5000, 1000)
        assert pool.stats().blocks_rotten == 3
        assert pool.last_rot() == "block 0 of export 'disk'"
        with pytest.raises(EngineError):
            disk.write(10, b"a part of it")  # the rest of it is not known
        disk.write(0, noise(2))
        assert disk.read(0, BLOCK) == noise(2)


@pytest.mark.parametrize("anew", ["written", "zeroed", "zeroed without a hole"])
def test_a_rotten_last_block_is_right_again_when_all_that_the_export_has_of_it_is_written(
    tmp_path: Path, anew: str
) -> None:
    """The rest of the block is behind the end, where nobody reads and nobody can write."""
    with rotten(tmp_path / "arena", half_random(1)) as pool:
        (disk,) = pool.disks()
        disk.resize(512)
        for offset, length in ((0, 511), (1, 511)):
            with pytest.raises(EngineError, match="is not what was written"):
                disk.write(offset, bytes(length))
        with pytest.raises(EngineError, match=r"its last block held more before .* write its 512 bytes at 0 anew"):
            disk.resize(BLOCK)
        if anew == "written":
            disk.write(0, noise(1)[:512])
        else:
            disk.zero(0, 512, no_hole="without" in anew)
        assert pool.stats().same_pages == (anew != "written")  # nothing is left of what was there
        disk.resize(2 * BLOCK)
        written = noise(1)[:512] if anew == "written" else bytes(512)
        assert disk.read(0, 2 * BLOCK) == written.ljust(2 * BLOCK, b"\0")
        pool.check()


@pytest.mark.parametrize("kind", CONTENTS)
def test_verify_off_delivers_what_is_stored(tmp_path: Path, kind: str) -> None:
    with rotten(tmp_path / "arena", CONTENTS[kind], verify=False) as pool:
        (disk,) = pool.disks()
        assert disk.read(0, BLOCK) != CONTENTS[kind]
        pool.verify = True
        with pytest.raises(EngineError):
            disk.read(0, BLOCK)


@pytest.mark.parametrize("verify", [True, False])
def test_recompression_leaves_rot_as_it_is(tmp_path: Path, verify: bool) -> None:
    """Half of a block of prose is enough for Zstandard to make it smaller; it may not."""
    with rotten(tmp_path / "arena", prose(1), verify=verify) as pool:
        run(Recompress(pool))
        assert pool.stats().blocks_rotten == 1
        pool.verify = True
        with pytest.raises(EngineError):
            pool.disks()[0].read(0, BLOCK)


def test_rot_is_not_taken_for_what_a_client_writes_inline(tmp_path: Path) -> None:
    with rotten(tmp_path / "arena", half_random(1)) as pool:
        pool.inline_dedup = True
        (disk,) = pool.disks()
        disk.write(2 * BLOCK, half_random(1))
        assert disk.read(2 * BLOCK, BLOCK) == half_random(1)
        run(Fold(pool))
        assert disk.read(2 * BLOCK, BLOCK) == half_random(1)
        with pytest.raises(EngineError):
            disk.read(0, BLOCK)


@pytest.mark.parametrize("damage", ["object", "entry", "branch"])
def test_a_check_names_the_block(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "arena"
    with rotten(path, half_random(1)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        place = {"object": arena.object_of(1) + FIRST_RANDOM, "entry": arena.leaf(), "branch": arena.word_at(0, 1)}[
            damage
        ]
        rot = arena.object_of(1) + FIRST_RANDOM
        if damage != "object":
            arena.set_word(rot, arena.word(rot) ^ 1 << 20)  # sound again
            run(Check(pool))
            arena.set_word(place, 0)
        with pytest.raises(CheckFailed, match="block 0 of export 'disk'"):
            run(Check(pool))


def test_a_bit_that_flips_in_the_directory_of_cells_leads_nobody_astray(tmp_path: Path) -> None:
    """It has no checks, so it is believed when it is opened, and never again."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 20)
        disk.write(0, text(1) + noise(2))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            word = arena.word(SEGMENTS_AT)
            arena.set_word(SEGMENTS_AT, word ^ 1)
            assert disk.read(0, 2 * BLOCK) == text(1) + noise(2)
            disk.write(BLOCK, text(3))
            assert disk.read(0, 2 * BLOCK) == text(1) + text(3)
            arena.set_word(SEGMENTS_AT, word)
        pool.check()
    with Pool(path=str(path)) as pool:
        assert pool.disks()[0].read(0, 2 * BLOCK) == text(1) + text(3)


@pytest.mark.parametrize("level", [1, 3])
def test_a_walk_ends_where_a_copy_leads_nowhere(tmp_path: Path, level: int) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        before, copy = two_copies(pool)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            Arena(view).set_word(Arena(view).word_at(0, level, copy.number), 0)
            with pytest.raises(EngineError, match="block 0 is not what was written"):
                Walk(copy, before, Told()).step()


@pytest.mark.parametrize(("level", "hidden"), [(1, 512), (2, 512 * 512), (3, 2 * 512 * 512)])
def test_a_walk_tells_all_that_its_origin_may_hide(tmp_path: Path, level: int, hidden: int) -> None:
    """Whoever has the origin has it as it was; nobody here knows what differs, so holes are told as well."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        before, copy = two_copies(pool)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            Arena(view).set_word(Arena(view).word_at(0, level, before.number), 0)
            walk, told = Walk(copy, before, Told()), 0
            while (step := walk.step()) is not None:
                told += step[1]
            assert told == hidden


def two_copies(pool: Pool) -> list[Disk]:
    """Of 2 GiB, of which the first three blocks differ: the last of them is a hole now."""
    disk = pool.create("disk", 2 << 30)
    disk.write(0, half_random(1) + half_random(2) + half_random(4))
    copies = moment.snapshot_together([disk], ["before"])
    disk.write(0, half_random(3))
    disk.trim(2 * BLOCK, BLOCK)
    return copies + moment.snapshot_together([disk], ["copy"])
