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
GENERATION_AT = 24
BITS = {"state": 1 << 1, "flags": 1 << 48, "generation": 1}


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
        "state": counting_head(arena, 0),  # the lower half
        "generation": counting_head(arena, 0) + GENERATION_AT,
        "current": arena.entry(0) + CURRENT_AT,
    }[what]


CHANGES: dict[str, Callable[[Pool, Disk], object]] = {
    "grow": lambda _, disk: disk.resize(2 * SIZE),
    "shrink": lambda _, disk: disk.resize(BLOCK),
    "rename": lambda pool, disk: pool.rename(disk, "renamed"),
}
COPIES: dict[str, Callable[[Pool, Disk], Disk]] = {
    "clone": lambda pool, disk: pool.clone(disk, "copy"),
    "copy at a moment": lambda _, disk: moment.snapshot_together([disk], ["copy"])[0],
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


@pytest.mark.parametrize("what", ["name", "size", "flags", "state", "generation", "current"])
@pytest.mark.parametrize("copy", COPIES)
def test_what_a_damaged_entry_is_of_can_be_copied_and_removed(tmp_path: Path, what: str, copy: str) -> None:
    """The process knows the export's size and domain, and its root has a check of its own: a copy's entry is right."""
    path = tmp_path / "arena"
    with in_use(path) as (pool, arena):
        disk, _ = pool.disks()
        disk.write(SIZE - BLOCK, half_random(7))
        disk.resize(SIZE // 2)
        place = place_of(arena, what)
        arena.set_word(place, arena.word(place) ^ BITS.get(what, 1 << 40))
        assert disk.damaged
        disk.write(BLOCK, half_random(3))
        twin = COPIES[copy](pool, disk)
        assert not twin.damaged
        assert twin.domain == disk.domain
        assert twin.size_bytes == disk.size_bytes == SIZE // 2
        assert twin.read(0, 2 * BLOCK) == disk.read(0, 2 * BLOCK) == half_random(0) + half_random(3)
        pool.delete(disk)
        if copy == "copy at a moment":
            moment.finish(twin)
            moment.reveal(twin)
        pool.check()
    with Pool(path=str(path)) as pool:
        found = {disk.name: disk for disk in pool.disks()}
        assert {name: disk.size_bytes for name, disk in found.items()} == {"copy": SIZE // 2, "other": SIZE}
        assert found["copy"].read(BLOCK, BLOCK) == half_random(3)
        found["copy"].resize(SIZE)
        assert found["copy"].read(SIZE - BLOCK, BLOCK) == bytes(BLOCK)
        pool.check()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_damaged_entry_shows_nothing_from_behind_its_end(tmp_path: Path, copy: str) -> None:
    """The entry knew that something is left there, and nobody can believe it."""
    path = tmp_path / "arena"
    with in_use(path) as (pool, arena):
        disk, _ = pool.disks()
        pool.mem_limit = BLOCK
        disk.resize(100)  # there is no room to clear the rest of the block
        pool.mem_limit = 0
        place = place_of(arena, "name")
        arena.set_word(place, arena.word(place) ^ 1)
        twin = COPIES[copy](pool, disk)
        twin.resize(BLOCK)
        assert twin.read(0, BLOCK) == half_random(0)[:100].ljust(BLOCK, b"\0")


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
