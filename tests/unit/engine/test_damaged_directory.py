"""Bits that flip in the export directory of an open arena: nothing is served of them, and no change makes them true."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdzram.engine import moment
from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError, CheckFailed, EngineError
from tests.support.arena import CURRENT_AT, HEAD_SIZE, HEADS_AT, NAME_AT, Arena
from tests.unit.engine.blocks import BLOCK, half_random, run

SIZE = 16 << 20
SIZE_AT = 8  # in a head: behind its state and flags


@contextmanager
def in_use(path: Path) -> Iterator[tuple[Pool, Arena]]:
    """A pool of two exports with a block each, and the bytes of its arena beside it."""
    with Pool(path=str(path)) as pool:
        for number, name in enumerate(("disk", "other")):
            pool.create(name, SIZE).write(0, half_random(number))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            yield pool, Arena(view)


def counting_head(arena: Arena, export: int) -> int:
    at = arena.entry(export)
    return at + HEADS_AT + (arena.word(at + CURRENT_AT) >> 16 & 1) * HEAD_SIZE


def place_of(arena: Arena, what: str) -> int:
    return {
        "name": arena.entry(0) + NAME_AT,
        "size": counting_head(arena, 0) + SIZE_AT,
        "flags": counting_head(arena, 0),  # the upper half of its first word
        "current": arena.entry(0) + CURRENT_AT,
    }[what]


CHANGES: dict[str, Callable[[Pool, Disk], object]] = {
    "grow": lambda _, disk: disk.resize(2 * SIZE),
    "shrink": lambda _, disk: disk.resize(BLOCK),
    "rename": lambda pool, disk: pool.rename(disk, "renamed"),
    "clone": lambda pool, disk: pool.clone(disk, "clone"),
    "copy at a moment": lambda _, disk: moment.snapshot_together([disk], ["copy"]),
}


@pytest.mark.parametrize("what", ["name", "size", "flags", "current"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_makes_a_damaged_entry_true(tmp_path: Path, what: str, change: str) -> None:
    """A change has a check of its own: of what is no more what was written none may be made."""
    path = tmp_path / "arena"
    with in_use(path) as (pool, arena):
        disk, other = pool.disks()
        place = place_of(arena, what)
        arena.set_word(place, arena.word(place) ^ 1 << 40)
        with pytest.raises(EngineError, match="is not what was written"):
            CHANGES[change](pool, disk)
        assert CHANGES[change](pool, other) is not disk  # others are changed as ever
        with pytest.raises(CheckFailed, match="entry 0 of the export directory"):
            run(Check(pool))
    with pytest.raises(ArenaError, match="is damaged"):
        Pool(path=str(path))


def test_damage_that_goes_away_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with in_use(path) as (pool, arena):
        disk, _ = pool.disks()
        place = place_of(arena, "size")
        word = arena.word(place)
        arena.set_word(place, word ^ 1 << 40)
        with pytest.raises(EngineError, match="cannot resize export 'disk': its entry in the export directory"):
            disk.resize(BLOCK)
        assert disk.read(0, BLOCK) == half_random(0)  # its blocks are sound
        disk.identify(5)
        arena.set_word(place, word)
        assert disk.identity == 0
        disk.resize(2 * SIZE)
        pool.check()
    with Pool(path=str(path)) as pool:
        assert pool.disks()[0].size_bytes == 2 * SIZE


@pytest.mark.parametrize("used_before", [False, True])
def test_a_damaged_entry_that_is_free_is_passed_over(tmp_path: Path, used_before: bool) -> None:
    """A new export in it would have ended the server."""
    path = tmp_path / "arena"
    with in_use(path) as (pool, arena):
        if used_before:
            pool.delete(pool.create("gone", SIZE))
        place = counting_head(arena, 2)
        arena.set_word(place, arena.word(place) ^ 1 << 33 if used_before else 1)
        created = pool.create("new", SIZE)
        assert created.number == 3
        created.write(0, half_random(5))
        assert created.read(0, BLOCK) == half_random(5)
