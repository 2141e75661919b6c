"""Runs go on beside writers: what a check counts, and what a compaction empties, while writers have slots at hand.

A check counts what nobody has in hand, so it takes it from whoever has (kit.pyx); what compaction empties takes no
block of anybody. The engine itself says so where it can (must).
"""

from __future__ import annotations

import random
import threading
from functools import partial

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.fold import Compact
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from tests.model.test_writers import CONTENTS, LEAF, SEVERAL, meanwhile
from tests.support.threads import PATIENCE_SECONDS, in_threads, wait_until
from tests.unit.engine.blocks import BLOCK, half_random, prose, run, text

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


@pytest.mark.parametrize(("busy", "writes"), [(155, 1), (155, 4), (40, 9), (12, 3)])
def test_a_compaction_is_not_undone_by_what_writers_have_at_hand(busy: int, writes: int) -> None:
    """What it empties takes no block of theirs: neither a slot that they held then, nor one that they free later.

    The engine itself says so (must).
    """
    pool = Pool()
    disk = pool.create("disk", 8 * LEAF)
    for block in range(1240):
        disk.write(block * BLOCK, half_random(block))
    for block in range(1240):
        if block % 8:
            disk.trim(block * BLOCK, BLOCK)
    before = pool.stats().zspages
    compaction, turn = Compact(pool), 0
    while compaction.step(1):
        for _ in range(writes):
            disk.write(turn % busy * 8 * BLOCK, half_random(turn + 5000))
            turn += 1
    assert pool.stats().zspages < before
    pool.check()


def test_what_a_writer_has_at_hand_where_compaction_begins_to_empty_is_taken_from_it() -> None:
    """It fetched slots of a zspage that was the fullest then, and is the emptiest now. The engine says so (must)."""
    pool = Pool()
    disk = pool.create("disk", 8 * LEAF)
    elsewhere = 7 * LEAF

    def small(number: int) -> bytes:
        return half_random(number, 120)

    disk.write(elsewhere, text(1))  # so that there is a leaf, and others go beside
    begins: list[int] = []  # the first block of each zspage
    stored = 0
    while len(begins) < 5:
        disk.write(stored * BLOCK, small(stored))
        if pool.stats().zspages > len(begins) + 1:
            begins.append(stored)
        stored += 1

    def trim(zspage: int, first: float, behind: float) -> None:
        """A part of its blocks."""
        slots = begins[zspage + 1] - begins[zspage]
        start, end = (begins[zspage] + int(slots * part) for part in (first, behind))
        disk.trim(start * BLOCK, (end - start) * BLOCK)

    trim(0, 0, 0.2)
    pool.stats()  # takes back what is free, all of it in the first zspage, and what was at hand
    compaction = Compact(pool)
    compaction.step(1)
    pool.test_locks(linger="_move")  # when all is chosen, and what is at hand not yet taken back
    fetched = threading.Event()

    def write() -> None:
        disk.write(elsewhere, small(9000))
        for zspage in (1, 2, 3):
            trim(zspage, 0, 0.3)
        trim(0, 0.2, 0.9)
        fetched.set()
        wait_until(lambda: pool.lingering() > 0)
        for number in range(1, 16):
            disk.write(elsewhere + number * BLOCK, small(9000 + number))
        pool.test_locks()

    def compact() -> None:
        assert fetched.wait(PATIENCE_SECONDS)
        run(compaction, 1 << 20)

    in_threads(compact, write)
    pool.check()


def test_writers_beside_a_compaction_store_nothing_in_what_it_empties() -> None:
    """They have slots at hand as it chooses, and fetch others as it moves."""
    pool = Pool()
    disk = pool.create("disk", 8 * LEAF)
    pool.test_locks(pause=True)
    blocks, writers = 1200, 3

    def write(seed: int) -> None:
        choose = random.Random(seed)
        for turn in range(1500):
            block = choose.randrange(blocks // writers) * writers + seed
            if turn % 3 == 0 or choose.random() < 0.4:
                disk.write(block * BLOCK, half_random(turn * writers + seed))
            else:
                disk.trim(block * BLOCK, BLOCK)

    meanwhile(lambda: run(Compact(pool), 1 << 20))(
        lambda: in_threads(*(partial(write, seed) for seed in range(writers)))
    )
    pool.check()


def test_a_dictionary_is_as_large_as_what_is_stored_asks_for_whatever_writers_owe() -> None:
    """Who frees tells of it before those do who stored it: what was added up is less than nothing meanwhile, and of a
    dictionary that is to be far too large for its samples next to nothing is left."""
    pool = Pool()
    writers, each = 10, 60
    disk = pool.create("disk", writers * LEAF)
    written = threading.Barrier(writers)

    def write(number: int) -> None:
        for block in range(each):
            disk.write(number * LEAF + block * BLOCK, prose(number * each + block))
        written.wait(PATIENCE_SECONDS)  # or one that comes late goes on with what another owes

    in_threads(*(partial(write, number) for number in range(writers)))
    for number in range(writers // 2):
        disk.trim(number * LEAF, each // 6 * 5 * BLOCK)
    assert run(Recompress(pool, dictionary=True), 1 << 20).dictionary_bytes == 32 << 10
    pool.check()


def test_an_object_that_takes_the_handle_of_a_recompressed_one_is_recompressed_too() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    blocks = 200
    for turn in range(4):
        for block in range(blocks):
            disk.write(block * BLOCK, text(turn * blocks + block))
        assert run(Recompress(pool)).objects_seen == blocks


def test_a_check_counts_what_writers_had_at_hand_as_it_began() -> None:
    """They had it since the check was asked for, and before it counted anything."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    for block in range(100):
        disk.write(block * BLOCK, half_random(block))
    check = Check(pool, contents=False)
    for block in range(50):
        disk.write(block * BLOCK, half_random(block + 1000))
    run(check)
    pool.check()


def test_a_check_finds_nothing_beside_writers_that_never_pause() -> None:
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)

    def write(leaf: int, rounds: int = 3000) -> None:
        choose = random.Random(leaf)
        for turn in range(rounds):
            disk.write(leaf * LEAF + choose.randrange(60) * BLOCK, CONTENTS[turn % len(CONTENTS)] * 2)

    meanwhile(lambda: run(Check(pool), 300), lambda: run(Check(pool, contents=False), 3000))(
        lambda: in_threads(*(partial(write, leaf) for leaf in range(3)))
    )
    pool.check()


def test_a_check_begins_however_busy_writers_are() -> None:
    """From its first look on they take nothing into their hands: or it would wait until all of them pause at once."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)
    contents = [b"".join(half_random(turn * 64 + block) for block in range(64)) for turn in range(4)]
    for leaf in range(SEVERAL):
        disk.write(leaf * LEAF, contents[0])
    pool.test_locks(pause=True)
    asked, begun = threading.Event(), threading.Event()
    written = [0] * SEVERAL
    enough = 100

    def write(leaf: int) -> None:
        beside = 0
        while not begun.is_set() and beside < enough:
            disk.write(leaf * LEAF, contents[written[leaf] % 4])
            written[leaf] += 1
            beside += asked.is_set()

    def begin() -> None:
        wait_until(lambda: min(written) > 0)
        check = Check(pool, contents=False)
        asked.set()
        before = pool.turns_behind()
        check.step(1)
        begun.set()
        assert pool.turns_behind() - before < SEVERAL * 10
        run(check)

    in_threads(begin, *(partial(write, leaf) for leaf in range(SEVERAL)))
    pool.check()
