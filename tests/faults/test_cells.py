"""Cells that memory changed below an open pool: their blocks are errors, and nobody else notices.

A cell has no room for a check of where its object lies (engine/store.pyx), and whatever is done to an object begins
there. So one bit of half of the cells is flipped, and then everything is done that leads through a cell, each in a
process of its own: whoever believes one is found out.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.compact import Compact
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.scrub import Scrub
from nbdzram.errors import EngineError
from tests.faults.contents import BLOCK, FAR, NEAR, expected, mixed, noise, sparse
from tests.faults.damage import Image, cell_places, finish
from tests.faults.test_damage import RIGHT, TOLD, Expected, apart, arena_of, read_all
from tests.unit.engine.blocks import half_random

# What a bit of a cell's word is part of (engine/cells.pyx)
BITS = {
    "kind, so that no kind is so": 3,
    "kind, so that it is another": 1,
    "length": 15,
    "slot, behind the last": 26,
    "unit, a neighbour": 27,
    "unit, and a forward's target": 33,
    "unit, far away": 48,
    "unit, as far as can be": 54,
    "holders": 55,
}
CELL = 16
RAW, LZ4 = 1, 2
UNITS = (1 << 28) - 1
MOST_LOST = 20  # blocks with one content
SUSPECTS = range(100, 180)
ALIKE = range(180, 260)  # each two are equal, and encoded in the same way: a fold compares them where they lie
GAPS = range(300, 470, 3)


def word_at(image: Image, at: int) -> int:
    return int.from_bytes(image.word(at), "little")


def kind_of(word: int) -> int:
    return word & 15


def length_of(word: int) -> int:
    return (word >> 4 & 0xFFF) + 1


def slot_of(word: int) -> int:
    return word >> 16 & 0x7FF


def unit_of(word: int) -> int:
    return word >> 27 & UNITS


def alike(block: int) -> bytes:
    return sparse(3000 + block // 2)


def untidy(place: Path) -> Image:
    """An arena with every kind of content, equal objects that no fold has seen yet, and zspages with gaps."""
    path = place / "untidy"
    arena_of(2, place).write(path)
    with Pool(path=str(path)) as pool:
        disks = {disk.name: disk for disk in pool.disks()}
        for block in SUSPECTS:
            disks["twin"].write(block * BLOCK, sparse(block))
        for block in ALIKE:
            disks["twin"].write(block * BLOCK, alike(block))
        for block in GAPS:
            disks["plain"].trim(block * BLOCK, BLOCK)
            disks["copy"].trim(block * BLOCK, BLOCK)
    return Image.of(path)


def now_expected() -> Expected:
    """What `untidy` leaves."""
    exports = expected()
    exports["twin"] |= {block: sparse(block) for block in SUSPECTS} | {block: alike(block) for block in ALIKE}
    for name in ("plain", "copy"):
        for block in GAPS:
            exports[name].pop(block, None)
    return exports


def each_block(pool: Pool, change: Callable[[Disk, int], None]) -> None:
    """Change all blocks of all exports; none is refused, whatever it was."""
    for disk in pool.disks():
        for block in (*range(NEAR), *range(FAR, FAR + 100)):
            change(disk, block)


def overwrite(pool: Pool) -> None:
    each_block(pool, lambda disk, block: disk.write(block * BLOCK, noise(block)))


def overwrite_with_what_is_there(pool: Pool) -> None:
    pool.inline_dedup = True
    each_block(
        pool, lambda disk, block: disk.write(block * BLOCK, sparse(block) if block < NEAR else mixed(block % 15))
    )


def trim(pool: Pool) -> None:
    each_block(pool, lambda disk, block: disk.trim(block * BLOCK, BLOCK))


def clone_and_write(pool: Pool) -> None:
    for disk in pool.disks():
        twin = pool.clone(disk, f"{disk.name} once more")
        for block in range(7, NEAR, 64):
            twin.write(block * BLOCK, noise(block))
        pool.delete(twin)


def delete(pool: Pool) -> None:
    for disk in pool.disks():
        pool.delete(disk)


def look(pool: Pool) -> None:
    for disk in pool.disks():
        disk.extents(0, disk.size_bytes, 1000)
        disk.usage()
    finish(Scrub(pool))
    finish(Check(pool))


ACTS: dict[str, Callable[[Pool], object]] = {
    "look": look,
    "check": lambda pool: finish(Check(pool)),
    "fold": lambda pool: finish(Fold(pool)),
    "compact": lambda pool: finish(Compact(pool)),
    "recompress": lambda pool: finish(Recompress(pool, level=19, dictionary=True)),
    "overwrite": overwrite,
    "overwrite with what is there": overwrite_with_what_is_there,
    "trim": trim,
    "clone and write": clone_and_write,
    "delete": delete,
}
KEEP_CONTENT = ("look", "check", "fold", "compact", "recompress", "clone and write")


def flip(view: mmap.mmap, at: int, bit: int) -> None:
    (word,) = struct.unpack_from("<Q", view, at)
    struct.pack_into("<Q", view, at, word ^ 1 << bit)


def told(image: Image, path: Path, bit: int, act: str, exports: Expected) -> str:
    """Flip a bit of half of the cells' words below a pool, and do something."""
    image.write(path)
    with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        dice = random.Random(bit)
        for at in cell_places(image):
            # By a coin: equal objects stand in two rows, of which every second cell would be the same ones.
            if at % CELL == 0 and dice.random() < 0.5:
                flip(view, at, bit)
        ACTS[act](pool)
        return read_all(pool, exports) if act in KEEP_CONTENT else RIGHT


@pytest.mark.parametrize("bit", BITS.values(), ids=BITS)
def test_whoever_comes_through_a_cell_looks_whether_its_object_can_be_there(place: Path, bit: int) -> None:
    image, exports, path = untidy(place), now_expected(), place / "open"
    outcomes = {act: apart(partial(told, image, path, bit, act, exports)) for act in ACTS}
    assert set(outcomes.values()) <= {RIGHT, TOLD}, outcomes


def test_the_same_arena_without_a_change_is_right(place: Path) -> None:
    path = place / "open"
    untidy(place).write(path)
    with Pool(path=str(path)) as pool:
        assert read_all(pool, now_expected()) == RIGHT
        folded = Fold(pool)
        finish(folded)
        compacted = Compact(pool)
        finish(compacted)
        assert folded.report().objects_merged > 0
        assert compacted.report().objects_moved > 0
        pool.check()


def others_after(image: Image, path: Path, at: int, word: int, exports: Expected) -> str:
    """Change one cell's word below a pool, let go of the blocks that cannot be read, and store others instead."""
    image.write(path)
    with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        struct.pack_into("<Q", view, at, word)
        lost = 0
        for disk in pool.disks():
            for block in exports[disk.name]:
                try:
                    disk.read(block * BLOCK, BLOCK)
                except EngineError:
                    lost += 1
                    disk.trim(block * BLOCK, BLOCK)
                    exports[disk.name][block] = bytes(BLOCK)
        fresh = pool.create("fresh", len(SUSPECTS) * BLOCK)
        for number in range(len(SUSPECTS)):
            fresh.write(number * BLOCK, noise(5000 + number) if number % 2 else sparse(5000 + number))
        pool.delete(fresh)
        assert 0 < lost < MOST_LOST
        return read_all(pool, exports)


@pytest.mark.parametrize("where", ["behind the last slot", "in a zspage of another size"])
def test_a_cell_that_leads_astray_costs_its_own_blocks_alone(place: Path, where: str) -> None:
    image, exports, path = untidy(place), now_expected(), place / "open"
    cells = {at: word_at(image, at) for at in cell_places(image) if at % CELL == 0}
    whole = next(unit_of(word) for word in cells.values() if kind_of(word) == RAW)
    compressed = [at for at, word in cells.items() if kind_of(word) == LZ4]
    for at in compressed[:: len(compressed) // 8]:
        word = cells[at] | 1 << 26 if where == "behind the last slot" else cells[at] & ~(UNITS << 27) | whole << 27
        assert apart(partial(others_after, image, path, at, word, exports)) == RIGHT, hex(at)


def test_behind_the_last_slot_lies_what_is_somebody_elses(place: Path) -> None:
    """Slots of 2,048 bytes fill a unit: behind its last one the next unit begins, whose object would go."""
    path = place / "open"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 96 * BLOCK)
        for block in range(96):
            disk.write(block * BLOCK, half_random(block, 2010))
    image = Image.of(path)
    cells = {at: word_at(image, at) for at in cell_places(image) if at % CELL == 0}
    places = {(unit_of(word), slot_of(word)): at for at, word in cells.items()}
    first, _ = min(places)
    last = max(slot for unit, slot in places if unit == first)
    assert (last, length_of(cells[places[first, 0]]) > 2032, (first + 1, 0) in places) == (31, True, True)
    with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        (disk,) = pool.disks()
        flip(view, places[first, 0], 16 + 5)  # it names slot 32
        blocks = {block: half_random(block, 2010) for block in range(96)}
        (lost,) = [block for block in blocks if not is_readable(disk, block)]
        for block in (lost + 1, lost):  # the first so that there is a free slot which the second would lead to
            del blocks[block]
            disk.trim(block * BLOCK, BLOCK)
            pool.stats()  # what went is taken back
        assert [block for block in blocks if not is_readable(disk, block)] == []


def is_readable(disk: Disk, block: int) -> bool:
    try:
        return disk.read(block * BLOCK, BLOCK) == half_random(block, 2010)
    except EngineError:
        return False


def test_a_dictionary_is_trained_from_what_can_be_read(place: Path) -> None:
    path = place / "open"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 600 * BLOCK)
        for block in range(600):
            disk.write(block * BLOCK, sparse(block))
    image = Image.of(path)

    def train() -> str:
        with Pool(path=str(path)) as pool, path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            for at in cell_places(image)[:800:8]:
                flip(view, at // CELL * CELL, 54)
            run = Recompress(pool, level=3, dictionary=True)
            finish(run)
            return TOLD if run.report().dictionary_bytes else RIGHT

    assert apart(train) == TOLD
