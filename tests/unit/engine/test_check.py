"""A check finds what does not hold, and nothing else, however busy clients are meanwhile."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import CheckReport
from nbdzram.engine.run import HOLD_COUNT
from nbdzram.errors import CheckFailed
from tests.support.arena import REF, Arena
from tests.unit.engine.blocks import AT_HAND, BLOCK, half_random, noise, run
from tests.unit.engine.test_quiescence import a_reader

LEAF = 512 * BLOCK


@contextmanager
def damaged(path: Path) -> Iterator[tuple[Pool, Arena]]:
    """A pool of 100 blocks, some folded, and a way to change its bytes."""
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 << 20)
        for number in range(100):
            disk.write(number * BLOCK, half_random(number % 60))
        run(Fold(pool))
        run(Check(pool))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            yield pool, Arena(view)


def test_a_step_decodes_a_few_objects_however_many_numbers_it_may_count() -> None:
    """Each costs as much of its budget as it is of the progress: else it does not keep to its share."""
    pool = Pool()
    pool.create("disk", 200 * BLOCK).write(0, b"".join(map(half_random, range(200))))
    check, seen = Check(pool), [0]
    while check.step(640):
        seen.append(check.report().objects_checked)
    assert seen[-1] == 200
    assert max(after - before for before, after in pairwise(seen)) == 10


def test_an_object_whose_bytes_changed_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        place = arena.object_of(1)
        arena.set_word(place + 64, arena.word(place + 64) ^ 1)
        pool.check()  # no count knows
        with pytest.raises(CheckFailed, match="handle 1 does not decode to the block"):
            run(Check(pool))


def test_a_holder_too_many_or_too_few_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        # A forward, and an object that nobody shared.
        for handle, complaint in (
            (90, "handle 90: 2 holders counted, 1 found"),
            (50, "shared objects: 40 counted, 41"),
        ):
            arena.set_word(arena.cell(handle), arena.word(arena.cell(handle)) + REF)
            with pytest.raises(CheckFailed, match=complaint):
                pool.check()
            arena.set_word(arena.cell(handle), arena.word(arena.cell(handle)) - REF)
        pool.check()


def test_an_entry_that_leads_elsewhere_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        entry = arena.word(arena.leaf() + 8 * 70)
        for handle, complaint in (
            (72, "handle 12: 2 holders counted, 3 found"),
            (5000, "handle 5000, which is free"),
        ):
            arena.set_word(arena.leaf() + 8 * 70, handle << 32 | entry & 0xFFFFFFFF)
            with pytest.raises(CheckFailed, match=complaint):
                pool.check()
        arena.set_word(arena.leaf() + 8 * 70, arena.word(arena.leaf() + 8 * 71))
        with pytest.raises(CheckFailed, match="holders counted"):
            pool.check()
        arena.set_word(arena.leaf() + 8 * 70, entry)
        pool.check()
        arena.set_word(arena.leaf() + 8 * 200, 1)  # a block of zeroes that no write stored
        with pytest.raises(CheckFailed, match="block 200 of export 'disk' is not what was written"):
            pool.check()


def test_two_objects_in_one_slot_are_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        one, other = arena.word(arena.cell(2)), arena.word(arena.cell(3))
        slot = 0x7FF << 16
        assert one & ~(slot | 0xFFF0) == other & ~(slot | 0xFFF0), "two neighbours of one size class"
        arena.set_word(arena.cell(3), other & ~slot | one & slot)
        with pytest.raises(CheckFailed, match="as another does"):
            pool.check()


def test_an_object_of_another_length_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        arena.set_word(arena.cell(4), arena.word(arena.cell(4)) - (1 << 4))
        with pytest.raises(CheckFailed, match="bytes of codec"):
            pool.check()


@pytest.mark.parametrize(("length", "slots"), [(-600, 0), (0, 200)], ids=["of another size", "behind the last slot"])
def test_an_object_where_none_of_its_size_can_be_is_found(tmp_path: Path, length: int, slots: int) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        arena.set_word(arena.cell(4), arena.word(arena.cell(4)) + length * (1 << 4) + slots * (1 << 16))
        with pytest.raises(
            CheckFailed, match=r"object 4 lies in slot \d+ of zspage \d+, where none of its size can be"
        ):
            pool.check()


def test_a_fingerprint_that_changed_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        arena.set_word(arena.cell(5) + 8, arena.word(arena.cell(5) + 8) ^ 1)
        with pytest.raises(CheckFailed, match="object 5 is neither pending nor in its bucket"):
            pool.check()


def test_an_export_whose_table_another_export_claims_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        pool.create("other", 16 << 20)
        arena.set_word(arena.root(1), arena.word(arena.root(0)))
        with pytest.raises(CheckFailed, match=r"table node \d+: 1 parents counted, 2 found"):
            pool.check()


def test_a_list_of_free_slots_that_leads_astray_is_found(tmp_path: Path) -> None:
    with damaged(tmp_path / "arena") as (pool, arena):
        first = arena.object_of(1)
        (disk,) = pool.disks()
        disk.trim(0, BLOCK)
        disk.trim(60 * BLOCK, BLOCK)  # its twin: now the slot is free
        pool.check()
        struct.pack_into("<H", arena.view, first, 1)
        with pytest.raises(CheckFailed, match="zspage"):
            pool.check()


def steps_of_one(check: Check) -> int:
    steps = 1
    while check.step(1):
        steps += 1
    return steps


def test_a_check_looks_at_one_thing_a_unit_of_its_budget() -> None:
    """So no step, and no hold of the pool's lock within it, is longer for a larger pool."""
    nothing_to_do = steps_of_one(Check(Pool()))
    pool = Pool()
    disk = pool.create("disk", 16 << 20)
    blocks = 20 * HOLD_COUNT
    for number in range(blocks):
        disk.write(number * BLOCK, half_random(number, 300))
    # Each block is looked at as a content, twice as a cell, as a holder, and in its export.
    assert steps_of_one(Check(pool)) >= nothing_to_do + 5 * blocks


def test_what_changes_during_a_check_is_passed_over_and_told() -> None:
    pool = Pool()
    disk = pool.create("disk", 16 << 20)
    for number in range(600):
        disk.write(number * BLOCK, half_random(number))
    check, turn = Check(pool), 0
    while check.step(25):
        turn += 1
        disk.write(turn % 600 * BLOCK, half_random(10_000 + turn))
    assert 0 < check.report().changing < 600
    assert run(Check(pool)) == CheckReport(objects_checked=600, changing=0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_between_the_steps_a_sound_pool_passes(seed: int) -> None:
    choose = random.Random(seed)
    pool = Pool(inline_dedup=seed % 3 == 0)
    pool.create("disk", 8 << 20)
    made = 0

    def disk() -> Disk:
        return choose.choice(pool.disks())

    def clone() -> None:
        nonlocal made
        made += 1
        pool.clone(disk(), f"clone {made}")

    def write() -> None:
        content = choose.choice((half_random(choose.randrange(30)), noise(choose.randrange(9)), b"\xc0" * BLOCK))
        disk().write(choose.randrange(2000) * BLOCK, content * choose.choice((1, 1, 40)))

    def delete() -> None:
        if len(pool.disks()) > 1:
            pool.delete(disk())

    happenings = (
        *(write, write, write, clone, delete),
        lambda: disk().trim(choose.randrange(1500) * BLOCK, choose.choice((1, 500)) * BLOCK),
        lambda: run(Fold(pool)),
        lambda: run(Compact(pool)),
        lambda: run(Recompress(pool)),
        lambda: disk().resize(choose.randrange(8 << 20, 9 << 20)),
    )
    for _ in range(30):
        choose.choice(happenings)()
    for _ in range(4):
        check = Check(pool)
        while check.step(choose.choice((1, 10, 100, 1000))):
            choose.choice(happenings)()
    pool.check()


@pytest.mark.parametrize("seed", range(5))
def test_tables_may_be_shared_copied_and_dropped_while_their_nodes_are_walked(seed: int) -> None:
    choose = random.Random(seed)
    pool = Pool()
    pool.create("disk", 64 << 20)
    pool.disks()[0].write(0, b"\x07" * (64 << 20))
    check, made = Check(pool, contents=False), 0
    while check.step(100):
        made += 1
        clone = pool.clone(choose.choice(pool.disks()), f"clone {made}", read_only=False)
        choose.choice((clone, *pool.disks())).write(choose.randrange(16384) * BLOCK, noise(made))
        choose.choice(pool.disks()).trim(choose.randrange(32) << 21, 2 << 20)
        if made > 5:
            pool.delete(choose.choice(pool.disks()[1:]))
    pool.check()


def test_a_check_within_a_check_takes_its_place_and_both_come_to_their_end() -> None:
    pool = Pool()
    disk = pool.create("disk", 16 << 20)
    for number in range(300):
        disk.write(number * BLOCK, half_random(number))
    check = Check(pool)
    for turn in range(40):
        check.step(20)
        disk.write(turn * BLOCK, noise(turn))
        pool.check()
    # Of those written meanwhile, some may have a handle that a writer had at hand from the beginning (kit.pyx).
    assert 300 <= run(check).objects_checked <= 300 + AT_HAND


def retired(disk: Disk) -> None:
    disk.write(0, b"".join(half_random(number, 900) for number in range(1000)))
    for number in range(0, 1000, 2):
        disk.trim(number * BLOCK, BLOCK)


def nodes(disk: Disk) -> None:
    for number in range(2500):
        disk.write(number * LEAF, b"\1" * BLOCK)


MOST: dict[str, Callable[[Disk], None]] = {
    "nodes": nodes,
    "objects": lambda disk: disk.write(0, b"".join(half_random(number, 100) for number in range(2500))),
    "zspages": lambda disk: disk.write(0, b"".join(noise(number) for number in range(700))),
    "retired slots": retired,
}


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("contents", [True, False])
def test_whatever_there_is_most_of_is_counted_to_its_end(most: str, *, contents: bool) -> None:
    """A check has room for each kind, and looks at all of it: in a sound pool nothing is missed, in another it is."""
    with Pool() as pool, a_reader():
        MOST[most](pool.create("disk", 8 << 30))
        for budget in (7, HOLD_COUNT, HOLD_COUNT + 1, 1 << 20):
            check = Check(pool, contents=contents)
            while check.step(budget):
                pass
            assert check.report().changing == 0
