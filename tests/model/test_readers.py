"""Readers take no lock: what they return is what their block was at one moment, whatever goes on beside them.

A block says whose it is: the export, the block, and the turn in which it was written. So a stale one (of a turn that
was over before the read began), a foreign one (of another export, or from elsewhere in this one) and a mixture are all
seen. Nothing else would see them here: the pools do not verify what they read, and where nothing else is said all
fingerprints are equal, so that an entry's check does not tell another object's handle from its own.

Readers step aside between an entry, its cell and its bytes, writers at every publication (test_locks,
pause_at_publish).
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import pause_at_publish
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import EngineError
from tests.support.threads import in_threads, wait_until
from tests.unit.engine.blocks import BLOCK, run

HEAD = struct.Struct("<QQQ")
LEAF = 512 * BLOCK
TURNS = 400

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def own(export: int, block: int, turn: int) -> bytes:
    """A block that says whose it is, at both ends; how it compresses changes with the turn."""
    head = HEAD.pack(export, block, turn)
    size = BLOCK - 2 * HEAD.size
    match turn % 3:
        case 0:
            filling = random.Random(turn % 50).randbytes(size)
        case 1:
            filling = random.Random(turn % 50).randbytes(size // 2) + bytes(size - size // 2)
        case _:
            filling = (b"%d " % turn * size)[:size]
    return head + filling + head


def turn_of(content: bytes, export: int, block: int) -> int:
    """The turn that a block is of; 0: a hole. Fails on what is not this block's."""
    found, where, turn = HEAD.unpack_from(content)
    if content == bytes(BLOCK):
        return 0
    assert (found, where) == (export, block), f"block {block} of {export} reads as block {where} of {found}"
    assert content == own(export, block, turn), f"block {block} of {export} is a mixture"
    return int(turn)


class Told:
    """What writers have begun and finished, block by block: what a read may find."""

    def __init__(self, blocks: int) -> None:
        self.begun = [0] * blocks
        self.done = [0] * blocks


def beside(work: Callable[[], None], *others: Callable[[], None]) -> None:
    """Do some work, and the others again and again meanwhile."""
    over = threading.Event()

    def works() -> None:
        try:
            work()
        finally:
            over.set()

    def repeats(job: Callable[[], None]) -> Callable[[], None]:
        def again() -> None:
            while not over.is_set():
                job()

        return again

    in_threads(works, *(repeats(job) for job in others))


def met(pool: Pool) -> None:
    """The end of each story: readers and writers did meet, and no reader found bytes that were not an object's."""
    again, misread = pool.readers_looked_again()
    assert misread == 0
    assert again > 0, "nobody met"
    pool.check()


def paused(**options: object) -> Pool:
    pool = Pool(verify=False, **options)  # type: ignore[arg-type]
    pool.test_locks(pause=True)
    pause_at_publish(True)
    return pool


def written(disk: Disk, told: Told, block: int, turn: int) -> None:
    told.begun[block] = turn
    disk.write(block * BLOCK, own(1, block, turn))
    told.done[block] = turn


def read_in_order(disk: Disk, told: Told, block: int) -> None:
    before = told.done[block]
    turn = turn_of(disk.read(block * BLOCK, BLOCK), 1, block)
    assert before <= turn <= told.begun[block], f"block {block}: turn {turn}, when {before} was over"


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_a_block_is_overwritten_under_its_readers(blocks: int) -> None:
    """One block, and some: then handles and slots of one are another's soon."""
    pool = paused(fingerprint_mask=0)
    disk = pool.create("disk", LEAF)
    told = Told(blocks)

    def write() -> None:
        for turn in range(1, 4 * TURNS // blocks):
            for block in range(blocks):
                written(disk, told, block, turn * blocks + block)

    def read() -> None:
        for block in range(blocks):
            read_in_order(disk, told, block)

    beside(write, read, read, read)
    met(pool)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_blocks_go_and_come_under_their_readers(in_a_file: bool, tmp_path: Path) -> None:
    """Pages and nodes go back to the system with them, and to read a hole of a file would take memory."""
    pool = paused(fingerprint_mask=0, path=str(tmp_path / "arena") if in_a_file else None)
    disk = pool.create("disk", 64 * LEAF)
    places = [0, 1, 600, 20000]

    def change() -> None:
        for turn in range(3, TURNS // 6):
            for block in places:
                disk.write(block * BLOCK, own(1, block, turn - turn % 3))
            for block in places:
                disk.trim(block * BLOCK, BLOCK)

    def read() -> None:
        for block in places:
            turn_of(disk.read(block * BLOCK, BLOCK), 1, block)

    def ask() -> None:
        pool.stats()  # has what nobody sees taken back

    beside(change, read, read, ask)
    met(pool)


@pytest.mark.parametrize("kind", [Fold, Compact, Recompress, Check])
def test_objects_are_moved_merged_and_stored_again_under_their_readers(
    kind: Callable[[Pool], Fold | Compact | Recompress | Check],
) -> None:
    pool = paused()
    disk = pool.create("disk", LEAF)
    twin = pool.create("twin", LEAF)
    count = 60
    told = Told(count)

    def write() -> None:
        for turn in range(1, TURNS // 8):
            for block in range(count):
                content = own(1, block, turn)
                told.begun[block] = turn
                twin.write(block * BLOCK, content)  # so that there is something to fold
                disk.write(block * BLOCK, content)
                told.done[block] = turn
                if block % 3:
                    twin.trim(block * BLOCK, BLOCK)

    def read() -> None:
        for block in random.sample(range(count), count):
            read_in_order(disk, told, block)

    def keep_house() -> None:
        run(kind(pool), 30)

    beside(write, read, read, keep_house)
    met(pool)


def test_what_one_of_two_clones_writes_is_never_read_from_the_other() -> None:
    """They share a leaf, until one of them leaves it: then it is the other's alone, which writes into it as it is."""
    pool = paused(fingerprint_mask=0)
    disk = pool.create("disk", LEAF)
    told = Told(4)
    for block in range(4):
        written(disk, told, block, 1)

    def part() -> None:
        for turn in range(2, TURNS):
            twin = pool.clone(disk, f"twin {turn}")
            written(disk, told, turn % 4, turn)  # a copy of the leaf: the one before is the twin's
            for block in range(4):
                twin.write(block * BLOCK, own(2, block, turn))
            for block in range(4):
                assert turn_of(twin.read(block * BLOCK, BLOCK), 2, block) == turn
            pool.delete(twin)

    def read() -> None:
        for block in range(4):
            read_in_order(disk, told, block)

    beside(part, read, read, read)
    met(pool)


def test_what_one_of_two_clones_trims_is_no_hole_in_the_other() -> None:
    pool = paused(fingerprint_mask=0)
    disk = pool.create("disk", 4 * LEAF)
    told = Told(4)
    for block in range(4):
        written(disk, told, block, 1)
    disk.write(2 * LEAF, own(1, 1024, 1))

    def part() -> None:
        for turn in range(2, TURNS):
            twin = pool.clone(disk, f"twin {turn}")
            written(disk, told, turn % 4, turn)
            disk.write(2 * LEAF, own(1, 1024, turn))
            twin.trim(0, 4 * LEAF)
            pool.delete(twin)

    def read() -> None:
        for block in range(4):
            read_in_order(disk, told, block)
        assert turn_of(disk.read(2 * LEAF, BLOCK), 1, 1024) > 0

    beside(part, read, read, read)
    met(pool)


def test_a_hole_is_one_only_where_the_way_to_it_is_still_the_exports() -> None:
    """A reader has seen the root; before it goes on the node there is the other clone's alone, and trimmed."""
    pool = Pool(verify=False)
    disk = pool.create("disk", 4 * LEAF)
    disk.write(0, own(1, 0, 1))
    twin = pool.clone(disk, "twin")
    turns: list[int] = []
    pool.test_locks(linger="a reader below the root")

    def read() -> None:
        turns.append(turn_of(disk.read(0, BLOCK), 1, 0))

    def part() -> None:
        wait_until(lambda: pool.lingering() > 0)
        disk.write(BLOCK, own(1, 1, 2))  # a copy of all that leads there
        twin.trim(0, 4 * LEAF)
        pool.test_locks()

    in_threads(read, part)
    assert turns == [1]
    met(pool)


def test_a_disk_that_is_deleted_reads_as_it_was_or_not_at_all() -> None:
    """Never as holes, though its entries become that one by one; and what it had is soon another's."""
    pool = paused(fingerprint_mask=0)
    disks: list[Disk] = []
    turn = 0

    def fresh() -> Disk:
        nonlocal turn
        turn += 1
        disk = pool.create(f"disk {turn}", LEAF)
        for block in range(12):
            disk.write(block * BLOCK, own(1, block, 3 * turn))
        return disk

    def come_and_go() -> None:
        for _ in range(TURNS // 4):
            disks[:] = [fresh()]
            pool.delete(disks[0])

    def read() -> None:
        for disk in disks[:1]:
            number = int(disk.name.split()[1])
            for block in range(12):
                try:
                    content = disk.read(block * BLOCK, BLOCK)
                except EngineError as told:
                    assert "deleted" in str(told)
                else:
                    assert turn_of(content, 1, block) == 3 * number

    beside(come_and_go, read, read, read)
    met(pool)


def test_ages_are_noted_beside_writers_and_never_bring_an_old_entry_back() -> None:
    pool = paused(fingerprint_mask=0)
    disk = pool.create("disk", LEAF)
    told = Told(4)
    clock = 0

    def write() -> None:
        for turn in range(1, TURNS // 2):
            for block in range(4):
                written(disk, told, block, turn * 4 + block)

    def read() -> None:
        for block in range(4):
            read_in_order(disk, told, block)

    def go_on() -> None:
        nonlocal clock
        clock += 60
        pool.set_clock(clock)

    beside(write, read, read, go_on)
    met(pool)


@pytest.mark.slow
def test_everything_at_once() -> None:
    """In a pool with little room slots, handles, nodes and pages are used again as soon as may be."""
    pool = paused(fingerprint_mask=0xF, mem_limit=2 << 20, inline_dedup=True)
    disk = pool.create("disk", 64 * LEAF)
    count = 48
    told = Told(count)
    turns = [threading.Lock() for _ in range(4)]
    number = 0

    def write(stride: int) -> None:
        for turn in range(1, 40):
            for block in range(stride, count, 4):
                with turns[stride]:
                    written(disk, told, block, turn)

    def read() -> None:
        for block in random.sample(range(count), count):
            read_in_order(disk, told, block)

    def read_much() -> None:
        before = list(told.done)
        content = disk.read(0, count * BLOCK)
        for block in range(count):
            turn = turn_of(content[block * BLOCK :][:BLOCK], 1, block)
            assert before[block] <= turn <= told.begun[block]

    def clone() -> None:
        nonlocal number
        number += 1
        twin = pool.clone(disk, f"twin {number}")
        first = twin.read(0, count * BLOCK)
        twin.write(0, own(2, 0, 2))
        assert twin.read(BLOCK, (count - 1) * BLOCK) == first[BLOCK:]
        pool.delete(twin)

    def trim_elsewhere() -> None:
        disk.write(9 * LEAF, own(1, 9 * 512, 3))
        disk.trim(9 * LEAF, LEAF)

    def keep_house() -> None:
        run(Fold(pool), 40)
        run(Compact(pool), 40)
        run(Recompress(pool), 40)
        run(Check(pool), 40)

    def write_all() -> None:
        in_threads(*(lambda stride=stride: write(stride) for stride in range(4)))

    beside(write_all, read, read, read, read, read_much, read_much, clone, trim_elsewhere, keep_house, keep_house)
    for block in range(count):
        assert turn_of(disk.read(block * BLOCK, BLOCK), 1, block) == told.done[block]
    met(pool)
