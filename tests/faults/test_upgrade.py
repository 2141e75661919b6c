"""Format 1 becomes format 2, or stays format 1: whatever happens, and wherever the process is killed."""

from __future__ import annotations

import lzma
import os
import struct
from pathlib import Path

import pytest

from nbdzram.engine.arena import fail_allocation
from nbdzram.engine.check import Check
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import kill_at_publish, moments_left
from nbdzram.engine.salvage import MISSING, OBJECT, Salvage
from nbdzram.errors import ArenaError
from tests.faults.contents import BLOCK, expected, noise, run
from tests.faults.test_damage import RIGHT, arena_of, read_all
from tests.support.arena import EXPORTS_AT, OLD_ROOT_AT, PAGE, REF, Arena

VERSION_AT = 8


def version(path: Path) -> int:
    return path.read_bytes()[VERSION_AT]


def old_arena(path: Path) -> None:
    arena_of(1, path.parent).write(path)


def killed_at(path: Path, moment: int) -> bool:
    """Open an arena in a process that is killed at a moment of its publications. False: it has fewer."""
    child = os.fork()
    if child == 0:
        kill_at_publish(moment)
        Pool(path=str(path))
        os._exit(0 if moments_left() else 1)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


MANY_ALIKE = 37  # moments: stores that make a node or a cell, each like the one before


def test_killed_at_any_moment_of_an_upgrade_the_arena_opens_and_all_is_there(place: Path) -> None:
    exports, moment, versions, ending = expected(), 1, set(), False
    while True:
        path = place / "arena"
        old_arena(path)
        if not killed_at(path, moment):
            if ending or moment < MANY_ALIKE:
                break
            moment, ending = moment - MANY_ALIKE + 1, True  # the last ones one by one
            continue
        versions.add(version(path))
        if version(path) == 1:
            killed_at(path, moment + 3)  # the next life is killed, too
        with Pool(path=str(path)) as pool:
            assert read_all(pool, exports) == RIGHT, f"killed at moment {moment}"
            if moment % 10 == 1:
                pool.check()
        assert version(path) == 2
        path.unlink()
        moment += 1 if moment < 40 or ending else MANY_ALIKE
    assert versions == {1, 2}
    assert moment > 40


def test_an_upgrade_without_room_is_refused_and_the_arena_stays_of_format_1(place: Path) -> None:
    old_arena(place / "arena")
    before = (place / "arena").read_bytes()
    for countdown in range(8):
        fail_allocation(countdown)
        try:
            Pool(path=str(place / "arena")).close()
        except ArenaError:
            assert version(place / "arena") == 1
            assert len((place / "arena").read_bytes()) == len(before)
        else:
            old_arena(place / "arena")
    fail_allocation(-1)
    with Pool(path=str(place / "arena")) as pool:
        assert read_all(pool, expected()) == RIGHT


def test_an_object_of_more_holders_than_a_cell_counts_keeps_no_arena_from_its_upgrade(place: Path) -> None:
    """Here a block that stands in all of a leaf, and in the next one; how many they are beyond 511 no cell says."""
    path = place / "arena"
    old_arena(path)
    content = bytearray(path.read_bytes())
    (page,) = struct.unpack_from("<I", content, EXPORTS_AT + OLD_ROOT_AT)
    for _ in range(2):
        (page,) = struct.unpack_from("<I", content, page * PAGE)
    leaf, following = struct.unpack_from("<2I", content, page * PAGE)
    block, entry = next(
        (number, entry)
        for number, entry in enumerate(struct.unpack_from("<512Q", content, leaf * PAGE))
        if entry >> 32 and not entry & 1
    )
    struct.pack_into("<512Q", content, leaf * PAGE, *[entry] * 512)
    struct.pack_into("<Q", content, following * PAGE, entry)
    arena = Arena(content)
    cell = arena.cell(entry >> 32)
    arena.set_word(cell, arena.word(cell) | 511 * REF)
    path.write_bytes(content)
    with Pool(path=str(path)) as pool:
        disk = pool.disks()[0]
        held = expected()[disk.name][block]
        assert disk.read(0, 513 * BLOCK) == held * 513
        pool.check()
        disk.trim(0, 513 * BLOCK)
        pool.check()


def require_all_salvaged(path: Path, names: set[str]) -> None:
    salvage = Salvage(str(path))
    found, lost = salvage.exports()
    assert ({name for _, name, *_ in found}, lost) == (names, 0)
    for number, *_ in found:
        for _, _, entries in salvage.leaves(number):
            assert entries is not None
            assert all(kind != MISSING for kind, _ in entries)
            assert all(salvage.content(handle) is not None for kind, handle in entries if kind == OBJECT)


def test_an_arena_of_this_format_that_an_earlier_program_wrote_is_read_and_goes_on(place: Path) -> None:
    """Whatever is computed of its words, places and seeds now is what was then: nobody else can tell."""
    path = place / "arena"
    with lzma.open(Path(__file__).with_name("format-2.arena.xz")) as packed:
        path.write_bytes(packed.read())
    exports = expected()
    require_all_salvaged(path, set(exports))
    with Pool(path=str(path)) as pool:
        assert read_all(pool, exports) == RIGHT
        assert pool.stats().compr_by_codec["zstd-dict"] > 0
        run(Check(pool))
        pool.disks()[0].write(0, noise(1))
    with Pool(path=str(path)) as pool:
        assert pool.disks()[0].read(0, BLOCK) == noise(1)
        pool.check()


def test_an_arena_that_was_cut_off_anywhere_is_salvaged_as_far_as_it_goes(place: Path) -> None:
    """What lay behind the end is missing, a dictionary with all that it decodes, and nothing else is read instead."""
    path, exports = place / "arena", expected()
    with lzma.open(Path(__file__).with_name("format-2.arena.xz")) as packed:
        whole = packed.read()
    read = set()
    for units in (*range(37, 70), 256):
        path.write_bytes(whole[: units << 16])
        try:
            salvage = Salvage(str(path))
        except ArenaError:
            continue
        count = 0
        for number, name, *_ in salvage.exports()[0]:
            for first, _, entries in salvage.leaves(number):
                for at, (kind, handle) in enumerate(entries or ()):
                    content = salvage.content(handle) if kind == OBJECT else None
                    assert content in (None, exports[name].get(first + at))
                    count += content is not None
        read.add(count)
        del salvage
    assert len(read) > 2


def test_the_old_arena_is_one_that_the_old_program_wrote() -> None:
    with lzma.open(Path(__file__).with_name("format-1.arena.xz")) as packed:
        assert packed.read(9) == b"NBDZRAM\n\x01"


def test_a_handle_with_more_holders_than_it_counts_is_refused(place: Path) -> None:
    """All that format 1 has against an entry that leads to another block."""
    old_arena(place / "arena")
    view = bytearray((place / "arena").read_bytes())
    node = int.from_bytes(view[5 * 65536 + 16 : 5 * 65536 + 20], "little")
    for _ in range(3):
        node = int.from_bytes(view[node * 4096 : node * 4096 + 4], "little")
    view[node * 4096 + 4 : node * 4096 + 8] = view[node * 4096 + 12 : node * 4096 + 16]
    (place / "arena").write_bytes(view)
    with pytest.raises(ArenaError, match="holders and counts"):
        Pool(path=str(place / "arena"))
    assert (place / "arena").read_bytes() == bytes(view)
