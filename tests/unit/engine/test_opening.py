"""An arena opened again: what is not sound is refused and stays as it is; what is sound is all there."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.arena import fail_allocation, refuse_releases
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import ArenaError, EngineError, PoolFull
from tests.support.arena import (
    CURRENT_AT,
    FORWARD,
    HEAD_SIZE,
    HEADS_AT,
    NAME_AT,
    PAGE,
    SEGMENTS_AT,
    UNIT,
    Arena,
)
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

BLOCKS = 100
MAPPED_AHEAD = 16 << 20
KEPT_PAGES = 16  # of a limit, for compaction (engine/ledger.pxd)
BUCKET = 4  # bytes
Change = Callable[[Arena], None]


def content(number: int) -> bytes:
    return half_random(number % 60)


def filled(path: Path, size: int = 1 << 40) -> None:
    """An arena of 100 blocks, some of them folded, and a clone."""
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", size)
        for number in range(BLOCKS):
            disk.write(number * BLOCK, content(number))
        disk.write(1 << 39, noise(1))
        pool.clone(disk, "twin")
        run(Fold(pool))


def change(path: Path, what: Change) -> bytes:
    """Change an arena's bytes; what they are then."""
    view = bytearray(path.read_bytes())
    what(Arena(view))
    path.write_bytes(view)
    return bytes(view)


def refused(path: Path, what: Change, reason: str) -> None:
    """A changed arena is refused with the reason and stays as it is; without the change it is as it was."""
    sound = path.read_bytes()
    changed = change(path, what)
    assert changed != sound
    with pytest.raises(ArenaError, match=reason):
        Pool(path=str(path))
    assert path.read_bytes() == changed
    path.write_bytes(sound)


def is_whole(path: Path) -> None:
    with Pool(path=str(path)) as pool:
        assert [disk.name for disk in pool.disks()] == ["disk", "twin"]
        for disk in pool.disks():
            assert disk.read(0, BLOCKS * BLOCK) == b"".join(content(number) for number in range(BLOCKS))
            assert disk.read(1 << 39, BLOCK) == noise(1)
        pool.check()


def set_segment(arena: Arena, unit: int) -> None:
    struct.pack_into("<I", arena.view, SEGMENTS_AT, unit)


def unit_of_object(arena: Arena, handle: int = 1) -> int:
    return arena.word(arena.cell(handle)) >> 27 & 0xFFFFFFF


def set_unit_of_object(arena: Arena, handle: int, unit: int) -> None:
    place = arena.cell(handle)
    arena.set_word(place, arena.word(place) & ~(0xFFFFFFF << 27) | unit << 27)


def flip(place: Callable[[Arena], int], bit: int = 0) -> Change:
    return lambda arena: arena.set_word(place(arena), arena.word(place(arena)) ^ 1 << bit)


def at(place: int) -> Callable[[Arena], int]:
    return lambda _: place


LAYOUT = {
    "segment behind the end": (lambda arena: set_segment(arena, 1 << 20), "units from 1048576 on are named"),
    "segment over fixed units": (lambda arena: set_segment(arena, 30), "unit 30 has two owners"),
    "segment in unit nought": (
        lambda arena: struct.pack_into("<I", arena.view, SEGMENTS_AT + 4, 1),
        "unit 1 has two owners",
    ),
    "segment over nodes": (
        lambda arena: set_segment(arena, (arena.word(arena.root()) >> 32) // 16),
        "damaged",
    ),
    "a gap between segments": (
        lambda arena: struct.pack_into("<I", arena.view, SEGMENTS_AT + 8, 100),
        "there is a cell segment 2, and none of number 1",
    ),
    "object in a fixed unit": (lambda arena: set_unit_of_object(arena, 1, 3), "unit 3 has two owners"),
    "object among nodes": (
        lambda arena: set_unit_of_object(arena, 1, (arena.word(arena.root()) >> 32) // 16),
        "has two owners",
    ),
    "object among cells": (
        lambda arena: set_unit_of_object(arena, 1, struct.unpack_from("<I", arena.view, SEGMENTS_AT)[0]),
        "has two owners",
    ),
    "object behind the end": (lambda arena: set_unit_of_object(arena, 1, 1 << 27), "are named"),
    "two objects in one slot": (
        lambda arena: arena.set_word(
            arena.cell(2), arena.word(arena.cell(2)) & ~(0x7FF << 16) | arena.word(arena.cell(1)) & 0x7FF << 16
        ),
        "object 2 lies where none can be",
    ),
    "slot of another class": (
        lambda arena: arena.set_word(arena.cell(1), arena.word(arena.cell(1)) ^ 1 << 14),
        "object 2 lies where none can be",
    ),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_units_pages_and_slots_have_one_owner(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "arena")
    what, reason = LAYOUT[name]
    refused(tmp_path / "arena", what, reason)
    is_whole(tmp_path / "arena")


def forward_of(arena: Arena) -> int:
    return next(handle for handle in range(1, 120) if arena.word(arena.cell(handle)) & 15 == FORWARD)


def lead(arena: Arena, handle: int, target: int) -> None:
    refs = arena.word(arena.cell(handle)) >> 55 << 55
    arena.set_word(arena.cell(handle), refs | target << 4 | FORWARD)


def astray_to(target: int) -> Change:
    return lambda arena: lead(arena, forward_of(arena), target)


def test_forwards_lead_to_the_same_content_and_not_in_a_circle(tmp_path: Path) -> None:
    filled(tmp_path / "arena")
    astray = "leads on to handle .*, which is not of the same content"

    def circle(arena: Arena) -> None:
        lead(arena, forward_of(arena), forward_of(arena))

    def double_circle(arena: Arena) -> None:
        loser = forward_of(arena)
        winner = arena.word(arena.cell(loser)) >> 4 & 0xFFFFFFFF
        lead(arena, winner, loser)

    refused(tmp_path / "arena", circle, astray)
    refused(tmp_path / "arena", double_circle, astray)
    for target in (0, 59, 5000, 1 << 31):
        refused(tmp_path / "arena", astray_to(target), astray)
    is_whole(tmp_path / "arena")


def copy_word(arena: Arena, source: int, target: int) -> None:
    arena.set_word(target, arena.word(source))


@pytest.mark.parametrize(("named", "level"), [(2, 1), (1, 3), (0, 2)])
def test_a_node_that_stands_at_two_levels_is_refused(tmp_path: Path, named: int, level: int) -> None:
    """By a word that is right in itself: walks would not end. `named` is the level of the node, `level` of the word."""
    filled(tmp_path / "arena")

    def forge(arena: Arena) -> None:
        page = arena.word(arena.word_at(0, named + 1)) >> 32
        arena.forge_word(page, 1 << 9 * level, level)

    refused(tmp_path / "arena", forge, f"stands at levels ({level - 1} and {named}|{named} and {level - 1})")


@pytest.mark.parametrize("level", range(1, 6))
def test_a_branch_or_root_that_is_not_what_was_written_is_refused(tmp_path: Path, level: int) -> None:
    """Cleared, one bit of its page or check changed, a hole made a node, or the word of another place: never a hole."""
    path = tmp_path / "arena"
    filled(path)
    wrong = "the block table of export number 0 is not what was written"

    def place(arena: Arena) -> int:
        return arena.root() if level == 5 else arena.word_at(0, level)

    refused(path, lambda arena: arena.set_word(place(arena), 0), wrong)
    refused(path, flip(place, 0), wrong)
    refused(path, flip(place, 33), wrong)
    if level < 5:
        refused(path, lambda arena: copy_word(arena, place(arena), place(arena) + 8), wrong)  # one node, two places
        refused(path, lambda arena: copy_word(arena, arena.root(), place(arena)), wrong)  # one node, two levels
    else:
        refused(
            path,
            lambda arena: copy_word(arena, arena.root(0), arena.root(1)),
            "export number 1 is not what was written",
        )
    is_whole(path)


def test_entries_that_are_not_right_are_errors_of_their_blocks_and_told(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    filled(path)

    def damage(arena: Arena) -> None:
        leaf = arena.leaf()
        arena.set_word(leaf + 8 * 3, 0)  # an object cleared
        copy_word(arena, leaf + 8 * 5, leaf + 8 * 4)  # a handle in the wrong place
        arena.set_word(leaf + 8 * 6, arena.word(leaf + 8 * 6) ^ 1 << 32)  # another handle
        arena.set_word(leaf + 8 * 200, 0)  # a hole cleared
        arena.set_word(leaf + 8 * 201, 1)  # zeroes that nobody wrote
        copy_word(arena, leaf + 8 * 203, leaf + 8 * 202)  # a hole of another place
        arena.set_word(leaf + 8 * 7, arena.word(leaf + 8 * 7) ^ 3 << 17)  # only its age

    change(path, damage)
    with Pool(path=str(path)) as pool:
        assert pool.stats().blocks_rotten == 6
        disk, twin = pool.disks()
        for wrong in (3, 4, 6, 200, 201, 202):
            for export in (disk, twin):
                with pytest.raises(EngineError, match="is not what was written"):
                    export.read(wrong * BLOCK, BLOCK)
        assert pool.last_rot() == "block 202 of export 'twin'"
        for right in set(range(BLOCKS)) - {3, 4, 6}:
            assert disk.read(right * BLOCK, BLOCK) == content(right)
        disk.write(3 * BLOCK, noise(3))  # writing mends
        disk.trim(200 * BLOCK, 3 * BLOCK)
        assert disk.read(3 * BLOCK, BLOCK) == noise(3)
        assert disk.read(200 * BLOCK, 3 * BLOCK) == bytes(3 * BLOCK)
        with pytest.raises(EngineError):
            twin.read(3 * BLOCK, BLOCK)
        with pytest.raises(EngineError):
            disk.write(4 * BLOCK + 100, b"part of what nobody knows")
        for export in (disk, twin):
            for wrong in (3, 4, 6, 200, 201, 202):
                export.write(wrong * BLOCK, noise(wrong))
            assert export.read(5 * BLOCK, BLOCK) == content(5)
        pool.check()  # nothing was released that only a wrong entry led to


def head_of(arena: Arena, export: int) -> int:
    """Where the head that counts lies."""
    return arena.entry(export) + HEADS_AT + (arena.word(arena.entry(export) + CURRENT_AT) >> 16 & 1) * HEAD_SIZE


@pytest.mark.parametrize("offset", range(0, HEAD_SIZE, 8))
@pytest.mark.parametrize("bit", [0, 31])
def test_no_bit_of_a_directory_entry_can_change(tmp_path: Path, offset: int, bit: int) -> None:
    filled(tmp_path / "arena")
    refused(
        tmp_path / "arena",
        flip(lambda arena: head_of(arena, 1) + offset, bit),
        "entry 1 of the export directory is not what was written",
    )


def test_no_name_and_no_word_of_a_directory_entry_can_change(tmp_path: Path) -> None:
    filled(tmp_path / "arena")
    wrong = "of the export directory is not what was written"

    def older_head(arena: Arena) -> None:
        """The other head, whole as it is, in place of the one that counts."""
        place = arena.entry(0) + CURRENT_AT
        arena.set_word(place, arena.word(place) ^ 1 << 16)

    def swapped(arena: Arena) -> None:
        one, other = arena.entry(0), arena.entry(1)
        first, second = arena.view[one : one + 512], arena.view[other : other + 512]
        arena.view[one : one + 512], arena.view[other : other + 512] = second, first

    refused(tmp_path / "arena", flip(lambda arena: arena.entry(0) + NAME_AT), wrong)
    refused(tmp_path / "arena", flip(lambda arena: arena.entry(0) + NAME_AT + 200), wrong)
    refused(tmp_path / "arena", lambda arena: arena.set_word(arena.entry(1) + CURRENT_AT, 0), wrong)
    refused(tmp_path / "arena", flip(lambda arena: arena.entry(1) + CURRENT_AT, 40), wrong)
    refused(tmp_path / "arena", older_head, wrong)
    refused(tmp_path / "arena", swapped, wrong)
    refused(tmp_path / "arena", flip(lambda arena: arena.entry(7) + HEADS_AT), wrong)  # no export was ever there
    refused(tmp_path / "arena", lambda arena: arena.forge_name(1, b"disk"), "two exports are named 'disk'")
    is_whole(tmp_path / "arena")


@pytest.mark.parametrize("offset", [8, 12, 16, 24, 72, 80])
def test_no_constant_of_the_superblock_can_change(tmp_path: Path, offset: int) -> None:
    filled(tmp_path / "arena")
    for bit in (0, 13):
        refused(tmp_path / "arena", flip(at(offset), bit), "superblock|format|does not know")


def with_dictionary(path: Path) -> None:
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 << 20)
        for number in range(300):
            disk.write(number * BLOCK, prose(number))
        assert run(Recompress(pool, dictionary=True)).dictionary_bytes


def test_a_dictionary_is_what_was_written_or_the_arena_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with_dictionary(path)
    word, digest = 88, 120  # in the superblock

    def place(arena: Arena) -> int:
        return (arena.word(word) >> 36) * UNIT

    refused(path, flip(lambda arena: place(arena) + 8000, 5), "dictionary 0 is not what was written")
    refused(path, flip(at(word), 40), "the place of dictionary 0 is not what was written")
    refused(path, flip(at(word), 20), "the place of dictionary 0 is not what was written")
    refused(path, flip(at(digest), 3), "the place of dictionary 0 is not what was written")
    refused(path, lambda arena: arena.set_word(word, 0), "dictionary 0 is not what was written")
    with Pool(path=str(path)) as pool:
        assert pool.disks()[0].read(0, 300 * BLOCK) == b"".join(prose(number) for number in range(300))
        pool.check()


def test_a_recompression_strength_that_is_wrong_is_none(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with_dictionary(path)
    change(path, flip(at(152), 17))
    with Pool(path=str(path)) as pool:
        pool.check()
        run(Recompress(pool, level=1))
        assert pool.disks()[0].read(0, BLOCK) == prose(0)


@pytest.mark.parametrize("count", [61_440, 61_441, 65_535, 65_536, 65_537, 70_000])
def test_more_handles_than_a_page_or_a_segment_has_are_all_found(tmp_path: Path, count: int) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 30)
        disk.write(0, b"".join(text(number) for number in range(count)))
        assert pool.stats().handles == count
    with Pool(path=str(path)) as pool:
        assert pool.stats().handles == count
        disk = pool.disks()[0]
        for number in (0, 255, 256, count - 1):
            assert disk.read(number * BLOCK, BLOCK) == text(number)
        disk.write(count * BLOCK, text(count))
        assert pool.stats().handles == count + 1
        pool.check()


def test_suspects_are_suspects_again_and_the_index_is_as_large_as_it_was(tmp_path: Path) -> None:
    """It is made for every object at once, and most are no part of it here; then it grows and shrinks as ever."""
    distinct, equal = 3000, 9000
    buckets = 2 * distinct * 4  # bytes: at most two for each object in the index
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 30)
        for number in range(distinct):
            disk.write(number * BLOCK, half_random(number, 40))
        for number in range(distinct, distinct + equal):
            disk.write(number * BLOCK, half_random(distinct, 40))
        used = pool.stats().metadata
    with Pool(path=str(path)) as pool:
        pool.check()
        assert pool.stats().metadata <= used + buckets
        assert run(Fold(pool)).objects_merged == equal - 1
        disk = pool.disks()[0]
        for number in range(distinct, 3 * distinct):
            disk.write(number * BLOCK, half_random(number, 40))
        pool.check()
        disk.trim(0, 2 * distinct * BLOCK)
        pool.check()
        disk.write(0, half_random(3 * distinct - 1, 40))
        assert run(Fold(pool)).objects_merged == 1


def test_buckets_that_are_made_at_once_count_as_memory(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 30)
        for number in range(12000):
            disk.write(number * BLOCK, half_random(number, 40))
        used = pool.stats().metadata
    with Pool(path=str(path)) as pool:
        assert pool.stats().metadata >= used


def test_what_was_made_for_suspects_is_room_for_writes(tmp_path: Path) -> None:
    """The index is made for every object, and the limit holds for it; suspects are no part of it."""
    suspects, room = 60_000, 80  # pages
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 30)
        for number in range(suspects):
            disk.write(number * BLOCK, half_random(0, 40))
        used = pool.stats().memory_used
    with Pool(path=str(path), mem_limit=used + (KEPT_PAGES + room) * BLOCK) as pool:
        disk = pool.disks()[0]
        stored = 0
        with contextlib.suppress(PoolFull):
            while True:
                disk.write((suspects + stored) * BLOCK, noise(stored))
                stored += 1
        assert stored > room - suspects * BUCKET / BLOCK / 2


def test_the_most_memory_used_and_the_pages_are_those_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 64 << 20)
        for number in range(1000):
            disk.write(number * BLOCK, half_random(number))
        disk.trim(100 * BLOCK, 900 * BLOCK)
        used = pool.stats().mem_used_total
        assert pool.stats().mem_used_max > used
    before = path.stat().st_blocks
    with Pool(path=str(path)) as pool:
        assert pool.stats().mem_used_max == pool.stats().mem_used_total <= used
        assert path.stat().st_blocks <= before  # tail pages went back
        run(Compact(pool))
        assert pool.stats().mem_used_max <= used
        pool.check()


def test_what_lies_behind_the_slots_of_a_zspage_goes_with_it(tmp_path: Path) -> None:
    """Nobody put it there. But a node that is made of the page would find old words in it. What lies behind the last
    slot that is used of a zspage that is not full may be of slots that were, and goes at once."""
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 64 << 20)
        for number in range(300):
            disk.write(number * BLOCK, half_random(number, 2600))  # their class takes 11 pages of a unit
    places = []

    def leave(arena: Arena) -> None:
        for handle in (1, 300):
            place = (unit_of_object(arena, handle) + 1) * UNIT - PAGE
            assert not any(arena.view[place : place + PAGE])
            arena.view[place : place + PAGE] = noise(1)
            places.append(place)

    def is_left(place: int) -> bool:
        return any(path.read_bytes()[place : place + PAGE])

    change(path, leave)
    with Pool(path=str(path)) as pool:
        assert not is_left(places[1])
        pool.disks()[0].trim(0, 64 << 20)
        assert pool.stats().zspages == 0
        assert not is_left(places[0])


def test_what_recompression_made_is_not_tried_again_when_the_arena_was_opened(tmp_path: Path) -> None:
    with Pool(path=str(tmp_path / "arena")) as pool:
        disk = pool.create("disk", 64 << 20)
        for number in range(100):
            disk.write(number * BLOCK, prose(number))
        assert run(Recompress(pool)).objects_recompressed == 100
    with Pool(path=str(tmp_path / "arena")) as pool:
        assert run(Recompress(pool)).objects_seen == 0


def test_the_cell_of_what_nothing_leads_to_is_free(tmp_path: Path) -> None:
    """Its entry was damaged, or a process was killed before the cell was free."""
    path = tmp_path / "arena"
    filled(path)
    change(path, lambda arena: arena.set_word(arena.word_at(50), arena.word(arena.word_at(50)) ^ 1 << 40))
    handles = range(1, BLOCKS + 1)
    before = Arena(bytearray(path.read_bytes()))
    with Pool(path=str(path)) as pool:
        counted = pool.stats().handles
    after = Arena(bytearray(path.read_bytes()))
    free = [handle for handle in handles if after.word(after.cell(handle)) == 0]
    assert free == [handle for handle in handles if before.word(before.cell(handle)) == 0 or handle == 51]
    assert counted == BLOCKS + 1 - len(free)  # and the one far behind them


def test_a_page_that_the_system_does_not_take_back_reads_as_zeroes(tmp_path: Path) -> None:
    """Nodes are made of released pages, and what says a hole would be old entries there."""
    refuse_releases(True)
    try:
        for path in (None, str(tmp_path / "arena")):
            with Pool(path=path) as pool:
                disk = pool.create("disk", 64 << 20)
                for turn in range(3):
                    for number in range(600):
                        disk.write(number * BLOCK, half_random(number + turn))
                    disk.trim(0, 64 << 20)
                    assert disk.read(0, 600 * BLOCK) == bytes(600 * BLOCK)
                    disk.write(5 * BLOCK, noise(turn))
                    assert disk.read(0, 512 * BLOCK) == bytes(5 * BLOCK) + noise(turn) + bytes(506 * BLOCK)
                    pool.check()
        view = (tmp_path / "arena").read_bytes()
        left = [number for number in range(3, 600, 15) if half_random(number)[:64] in view]
        assert left == [], "what was released was cleared, to its last page"
    finally:
        refuse_releases(False)
    with Pool(path=str(tmp_path / "arena")) as pool:
        assert pool.disks()[0].read(5 * BLOCK, BLOCK) == noise(2)
        pool.check()


def test_what_was_free_is_taken_again(tmp_path: Path) -> None:
    """Free units that lie together, and those that lie alone: the file grows by what is mapped ahead alone."""
    path = tmp_path / "a.pool"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 30)
        for number in range(10_000):
            disk.write(number * BLOCK, noise(number))
        disk.trim(0, 5_000 * BLOCK)
        for number in range(5_000, 10_000, 200):
            disk.trim(number * BLOCK, 40 * BLOCK)
    size = path.stat().st_size
    with Pool(path=str(path)) as pool:
        (disk,) = pool.disks()
        for number in range(5_000):
            disk.write(number * BLOCK, noise(number))
    assert path.stat().st_size <= size + MAPPED_AHEAD


def test_every_export_of_a_directory_of_several_pages_is_found(tmp_path: Path) -> None:
    names = [f"disk{number}" for number in range(20)]
    with Pool(path=str(tmp_path / "a.pool")) as pool:
        disks = [pool.create(name, 1 << 20) for name in names]
        for disk in disks[3:12]:
            pool.delete(disk)
    with Pool(path=str(tmp_path / "a.pool")) as pool:
        assert sorted(disk.name for disk in pool.disks()) == sorted(names[:3] + names[12:])


def test_an_arena_cut_short_is_refused_and_stays_as_long_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    filled(path)
    whole = path.read_bytes()
    for size in (len(whole) // 2 + 100, 38 * UNIT, 36 * UNIT, UNIT):
        path.write_bytes(whole[:size])
        with pytest.raises(ArenaError):
            Pool(path=str(path))
        assert path.read_bytes() == whole[:size]
    path.write_bytes(whole)
    is_whole(path)


@pytest.mark.parametrize("left", [b"", bytes(PAGE), bytes(8) + b"\x02\0\0\0\0\x10\0\0" + b"seed" * 8])
def test_an_arena_whose_beginning_was_cut_off_begins_anew(tmp_path: Path, left: bytes) -> None:
    """Nothing was stored in it: the magic is the last word of the first page, and all else comes later."""
    path = tmp_path / "arena"
    with path.open("wb") as file:
        file.write(left)
        file.truncate(16 << 20 if left else 0)
    filled(path)
    is_whole(path)


def test_an_arena_whose_beginning_was_cut_off_behind_its_first_page_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written there before the magic looked as if somebody had stored it, and no server started."""
    path = tmp_path / "arena"
    for countdown in itertools.count():
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)  # so that the file stays as a kill leaves it
            fail_allocation(countdown)
            try:
                Pool(path=str(path)).close()
            except ArenaError:
                pass
            else:
                break
        filled(path)
        is_whole(path)
        path.unlink()
    fail_allocation(-1)
    assert countdown > 1


def refuse(_: str) -> None:
    raise PermissionError


def test_what_has_lost_its_magic_is_no_new_arena(tmp_path: Path) -> None:
    filled(tmp_path / "arena")
    refused(tmp_path / "arena", lambda arena: arena.set_word(0, 0), "is not an nbdzram arena")
    refused(tmp_path / "arena", flip(at(0)), "is not an nbdzram arena")


def test_who_cannot_begin_an_arena_leaves_no_file(tmp_path: Path) -> None:
    for countdown in range(2):
        fail_allocation(countdown)
        with pytest.raises(ArenaError, match="no room for an arena"):
            Pool(path=str(tmp_path / "arena"))
        assert not (tmp_path / "arena").exists()
    fail_allocation(-1)


def test_deletions_that_were_cut_off_are_finished_and_their_entries_used_again(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    filled(path)
    with Pool(path=str(path)) as pool:
        pool.delete(pool.disks()[0])
        pool.create("another", 1 << 20).write(0, noise(7))
    with Pool(path=str(path)) as pool:
        assert [disk.name for disk in pool.disks()] == ["another", "twin"]
        assert pool.disks()[0].read(0, BLOCK) == noise(7)
        assert pool.disks()[1].read(0, BLOCK) == content(0)
        pool.check()
