"""Writers of one pool go beside each other: what each stored is there, and what the pool counts is what it has.

Threads meet on one leaf, one object, one bucket of the index, one size class, with everything beside them that has the
pool's lock alone. Where a mistake needs a thread between two of another's steps, threads step aside at the locks and at
every publication (Pool.test_locks, pause_at_publish).
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import pause_at_publish
from nbdzram.engine.quiescence import grace_periods
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.run import HOLD_COUNT as HOLD
from nbdzram.engine.stats import PoolStats
from nbdzram.errors import EngineError, PoolFull
from tests.support.threads import PATIENCE_SECONDS, in_threads, wait_until
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

MIB = 1 << 20
LEAF = 512 * BLOCK
SEATS = 128  # threads that a pool lets write beside each other; those beyond write alone
SEVERAL = 8
KEPT_PAGES = 16  # of a limit, for what makes room
OWES = 64  # objects that a thread may have stored and not told of (engine/kit.pxd)
LOOKS_EVERY = 16  # objects that went (engine/kit.pxd)

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def meanwhile(*others: Callable[[], object]) -> Callable[[Callable[[], None]], None]:
    """Do some work, and the others again and again beside it."""
    over = threading.Event()

    def repeat(other: Callable[[], object]) -> None:
        while not over.is_set():
            other()

    def work(job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
            finally:
                over.set()

        in_threads(guarded, *(partial(repeat, other) for other in others))

    return work


def alone(pool: Pool, job: Callable[[], None]) -> int:
    """How often a job takes the pool's lock with everybody else shut out."""
    before, _ = pool.taken_alone()
    job()
    return pool.taken_alone()[0] - before


CONTENTS = (
    half_random(1),
    half_random(2),
    text(1),
    noise(1),
    half_random(3, 700),
    struct.pack("<Q", 7) * 512,
    noise(2),
)
"""Few, so that equal ones meet: in a bucket of the index, in a fold, and as one object with many holders."""


def test_blocks_that_are_overwritten_shut_nobody_out() -> None:
    pool = Pool()
    disk = pool.create("disk", 4 * LEAF)
    for block in range(2048):
        disk.write(block * BLOCK, half_random(block))

    def overwrite() -> None:
        for block in range(2048):
            disk.write(block * BLOCK, half_random(block + 2048))

    assert alone(pool, overwrite) < 2048 // 50
    pool.check()


def test_blocks_that_are_new_shut_nobody_out_but_for_their_tables() -> None:
    pool = Pool()
    disk = pool.create("disk", 4 * LEAF)

    def write() -> None:
        for block in range(2048):
            disk.write(block * BLOCK, half_random(block))

    assert alone(pool, write) < 2048 // 20
    pool.check()


@pytest.mark.parametrize("pausing", ["at locks", "at publications"])
def test_many_threads_in_one_leaf_with_everything_beside_them(pausing: str, tmp_path: Path) -> None:
    """Each has blocks of its own, and finds in them what it wrote last."""
    pool = Pool(path=str(tmp_path / "arena"))
    disk = pool.create("disk", LEAF)
    pool.test_locks(pause=pausing == "at locks")
    pause_at_publish(pausing == "at publications")
    threads, turns = 16, 60

    def write(seed: int) -> None:
        choose = random.Random(seed)
        mine = range(seed, 96, threads)
        holds = dict.fromkeys(mine, bytes(BLOCK))
        for turn in range(turns):
            block = choose.choice(mine)
            match choose.randrange(8):
                case 0:
                    disk.trim(block * BLOCK, BLOCK)
                    holds[block] = bytes(BLOCK)
                case 1:
                    disk.zero(block * BLOCK, BLOCK, no_hole=True)
                    holds[block] = bytes(BLOCK)
                case 2:
                    part = struct.pack("<QQ", seed, turn)
                    disk.write(block * BLOCK + 64, part)
                    holds[block] = holds[block][:64] + part + holds[block][80:]
                case _:
                    holds[block] = choose.choice(CONTENTS)
                    disk.write(block * BLOCK, holds[block])
            assert disk.read(block * BLOCK, BLOCK) == holds[block]
        for block, content in holds.items():
            assert disk.read(block * BLOCK, BLOCK) == content

    def keep_house() -> None:
        run(Fold(pool), 20)
        run(Compact(pool), 20)
        run(Recompress(pool), 20)
        run(Check(pool), 200)

    numbers = iter(range(1 << 20))

    def come_and_go() -> None:
        twin = pool.clone(disk, f"twin {next(numbers)}")
        first = twin.read(0, 96 * BLOCK)
        twin.write(BLOCK, CONTENTS[0])
        assert twin.read(2 * BLOCK, 94 * BLOCK) == first[2 * BLOCK :]
        pool.delete(twin)

    meanwhile(keep_house, come_and_go, pool.stats)(
        lambda: in_threads(*(partial(write, seed) for seed in range(threads)))
    )
    pool.check()
    disk.trim(0, LEAF)
    assert pool.stats().objects == 0
    assert pool.stats().handles == 0
    assert pool.stats().mem_used_total == 0
    pool.close()
    with Pool(path=str(tmp_path / "arena")) as pool:
        assert pool.stats().objects == 0


@pytest.mark.parametrize("shared", ["by a fold", "at the write"])
def test_an_object_that_many_release_at_once_goes_once(shared: str) -> None:
    """The last holder takes it along, whoever that is; the one before leaves it shared no more."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)
    places = [leaf * LEAF + block * BLOCK for leaf in range(SEVERAL) for block in range(4)]
    pause_at_publish(True)
    for turn in range(25):
        pool.inline_dedup = shared == "at the write"
        for place in places:
            disk.write(place, half_random(turn))
        run(Fold(pool))
        pool.inline_dedup = False
        assert pool.stats().objects == 1

        def replace(leaf: int, turn: int = turn) -> None:
            for block in range(4):
                disk.write(leaf * LEAF + block * BLOCK, half_random(1000 + turn * 100 + leaf * 4 + block))

        in_threads(*(partial(replace, leaf) for leaf in range(SEVERAL)))
        stats = pool.stats()
        assert (stats.objects, stats.shared_objects, stats.shared_bytes) == (len(places), 0, 0)
    pool.check()


@pytest.mark.parametrize("mask", [0, 0xFFFFFFFF << 32], ids=["equal", "equal in their lower half"])
def test_objects_of_one_bucket_come_and_go_by_many_threads(mask: int) -> None:
    """Where fingerprints are equal all objects but one wait for a fold; where half of them is, all are in one chain."""
    pool = Pool(fingerprint_mask=mask)
    disk = pool.create("disk", SEVERAL * LEAF)
    pool.test_locks(pause=True)

    def write(leaf: int) -> None:
        choose = random.Random(leaf)
        for turn in range(150):
            block = choose.randrange(6)
            disk.write(leaf * LEAF + block * BLOCK, half_random(turn * SEVERAL + leaf))
            assert disk.read(leaf * LEAF + block * BLOCK, BLOCK) == half_random(turn * SEVERAL + leaf)

    meanwhile(lambda: run(Fold(pool), 3), lambda: run(Check(pool, contents=False), 100))(
        lambda: in_threads(*(partial(write, leaf) for leaf in range(SEVERAL)))
    )
    pool.check()


def test_objects_of_one_bucket_come_and_go_while_nobody_shuts_writers_out() -> None:
    """No check, which they would wait for, and no fold: each stands in its bucket until it goes (must)."""
    pool = Pool(fingerprint_mask=0xFFFFFFFF << 32)
    disk = pool.create("disk", SEVERAL * LEAF)
    for leaf in range(SEVERAL):
        disk.write(leaf * LEAF, half_random(leaf))
    pool.test_locks(pause=True)

    def write(leaf: int) -> None:
        for turn in range(1, 100):
            disk.write(leaf * LEAF + turn % 6 * BLOCK, half_random(turn * SEVERAL + leaf))

    assert alone(pool, lambda: in_threads(*(partial(write, leaf) for leaf in range(SEVERAL)))) < SEVERAL * 100 // 4
    pool.test_locks()
    pool.check()
    disk.trim(0, SEVERAL * LEAF)
    assert pool.stats().objects == 0


def test_equal_blocks_of_many_threads_at_once_are_one_object_after_a_fold() -> None:
    """Of those that come at the same moment one is linked in the index; the others wait for a fold."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)
    for leaf in range(SEVERAL):
        disk.write(leaf * LEAF, text(leaf))
    for turn in range(40):
        pool.test_locks(pause=True)
        in_threads(*(partial(disk.write, leaf * LEAF, half_random(turn) * 3) for leaf in range(SEVERAL)))
        pool.test_locks()
        assert pool.stats().fold_pending == 3 * SEVERAL - 1
        run(Fold(pool))
        assert pool.stats().objects == 1
    pool.check()


def test_what_threads_had_at_hand_is_nobodys_when_somebody_asks() -> None:
    """Many wrote and some of them have ended: what is used is what their blocks need, and no more."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)

    def write(leaf: int) -> None:
        choose = random.Random(leaf)
        for turn in range(400):
            disk.write(leaf * LEAF + turn % 64 * BLOCK, half_random(turn * SEVERAL + leaf, choose.randrange(200, 3000)))
        for turn in range(64):
            disk.write(leaf * LEAF + turn * BLOCK, struct.pack("<Q", turn) * 512)

    in_threads(*(partial(write, leaf) for leaf in range(SEVERAL)))
    stats = pool.stats()
    assert (stats.handles, stats.objects, stats.mem_used_total, stats.zspages) == (0, 0, 0, 0)
    pool.check()


def test_a_pool_is_as_full_by_many_threads_as_by_one() -> None:
    """Near the limit nobody keeps anything from others: who is refused would have been refused alone. What many had at
    hand before may have begun one page of metadata more, as it does in one of a thousand runs."""
    limit, blocks = 6 * MIB, 3072

    def filled(threads: int) -> PoolStats:
        with Pool(mem_limit=limit) as pool:
            disk = pool.create("disk", blocks * BLOCK)
            for leaf in range(blocks // 512):
                disk.write(leaf * LEAF, noise(leaf))

            def write(number: int) -> None:
                for block in range(number, blocks, threads):
                    with contextlib.suppress(PoolFull):
                        disk.write(block * BLOCK, noise(block))

            in_threads(*(partial(write, number) for number in range(threads)))
            pool.check()
            return pool.stats()

    one, many = filled(1), filled(SEVERAL)
    assert many.memory_used == one.memory_used
    assert (many.metadata - one.metadata, one.orig_data_size - many.orig_data_size) in {(0, 0), (BLOCK, BLOCK)}


def test_chains_stay_short_however_many_threads_write() -> None:
    """What all of them tell of at once is fitted at once: at most three objects in two buckets, and what they owe."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)

    abreast = threading.Barrier(SEVERAL, timeout=PATIENCE_SECONDS)

    def fill(first: int) -> None:
        for block in range(first, first + 512):
            disk.write(block * BLOCK, half_random(block))
            if block % 8 == 0:
                abreast.wait()

    in_threads(*(partial(fill, 512 * number) for number in range(SEVERAL)))
    buckets = pool.buckets()  # asked for before the counters, which make it fit
    owed = SEVERAL * (OWES + HOLD)
    assert 2 * (pool.stats().objects - owed) <= 3 * buckets
    assert pool.stats().objects == SEVERAL * 512
    pool.check()


@pytest.mark.parametrize("lengths", [(2000,), tuple(range(600, 3300, 50))], ids=["alike", "of all sizes"])
def test_who_writes_seldom_looks_at_what_others_do(lengths: tuple[int, ...]) -> None:
    """To look whether nobody sees any more what went takes a line of each thread's: once for sixteen that went."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    blocks = 256
    for block in range(blocks):
        disk.write(block * BLOCK, half_random(block, lengths[block % len(lengths)]))
    before = grace_periods()
    for block in range(blocks):
        disk.write(block * BLOCK, half_random(block + blocks, lengths[block * 7 % len(lengths)]))
    assert 1 < grace_periods() - before <= blocks // LOOKS_EVERY + 1
    pool.check()


def test_what_a_thread_has_at_hand_is_given_out_before_anybody_is_refused() -> None:
    """One has pages at hand when the limit is lowered to what is stored; another has room for all that is left."""
    pool = Pool(mem_limit=64 * MIB)
    disk = pool.create("disk", 2 * LEAF)
    stored, more = 128, 8
    disk.write(LEAF, text(1))
    for block in range(stored):
        disk.write(block * BLOCK, noise(block))
    stats = pool.stats()
    used = stats.mem_used_total + stats.metadata
    for block in range(stored):
        disk.write(block * BLOCK, noise(block + stored))  # each into a page that was freed a while before
    pool.mem_limit = used + (more + KEPT_PAGES + 1) * BLOCK

    def write() -> None:
        for block in range(1, more + 1):
            disk.write(LEAF + block * BLOCK, noise(block))

    in_threads(write)
    assert pool.stats().failed_writes == 0
    pool.check()


def test_nobody_waits_for_ever_for_a_lock_that_others_want_all_the_time() -> None:
    """Writers go on beside a storm of those that shut them out, and these beside a storm of writers."""
    pool = Pool()
    disk = pool.create("disk", SEVERAL * LEAF)
    written = [0] * 4
    looked = [0] * 3
    enough = 300
    over = threading.Event()

    def write(number: int) -> None:
        while not over.is_set():
            disk.write(number * LEAF + written[number] % 32 * BLOCK, half_random(written[number]))
            written[number] += 1
            if min(written) >= enough and min(looked) >= enough:
                over.set()

    def look(number: int) -> None:
        while not over.is_set():
            disk.stats()
            looked[number] += 1

    in_threads(*(partial(write, number) for number in range(4)), *(partial(look, number) for number in range(3)))
    assert min(written) >= enough
    assert min(looked) >= enough


def test_more_threads_than_there_are_seats_write_all_the_same() -> None:
    pool = Pool()
    disk = pool.create("disk", 2 * LEAF)
    threads = SEATS + 20
    disk.write(0, text(1))
    everybody = threading.Barrier(threads)

    def write(number: int) -> None:
        disk.write(number * BLOCK, half_random(number))
        everybody.wait()  # so that none ends before all have come, and none has another's number
        disk.write(number * BLOCK, half_random(number + 1000))

    in_threads(*(partial(write, number) for number in range(threads)))
    for number in range(threads):
        assert disk.read(number * BLOCK, BLOCK) == half_random(number + 1000)
    pool.check()

    def write_again() -> None:
        for number in range(threads):
            disk.write(number * BLOCK, half_random(number + 2000))

    # Those that come later have the seats of those that ended.
    assert alone(pool, lambda: in_threads(write_again)) < threads // 10


def test_a_long_write_beside_a_resize_stores_nothing_behind_the_end() -> None:
    """It was judged by the size that was; each of its runs of blocks is held against the one that is."""
    pool = Pool()
    blocks, left = 512, 16
    for turn in range(5):
        disk = pool.create(f"disk {turn}", LEAF)
        disk.write(0, half_random(1))
        pool.test_locks(linger="beside__end")

        def write(disk: Disk = disk, turn: int = turn) -> None:
            with contextlib.suppress(ValueError):
                disk.write(0, half_random(turn) * blocks)

        def shrink(disk: Disk = disk) -> None:
            wait_until(lambda: pool.lingering() > 0)
            disk.resize(left * BLOCK)  # the writer has the stripe: what lies behind the end is cleared when it goes on

        def let_go(disk: Disk = disk) -> None:
            wait_until(lambda: disk.size_bytes == left * BLOCK)
            pool.test_locks()

        in_threads(write, shrink, let_go)
        assert disk.stats().stored <= left * BLOCK
        pool.check()


def test_who_comes_to_write_while_a_pool_closes_is_turned_away() -> None:
    """Who closes it waits for writers that were there before, and for no other: what is behind it is not the pool's."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(1))
    came_late: list[str] = []
    left_behind: list[int] = []  # writers, when the pool was closed
    pool.test_locks(linger="beside__end")

    def closes() -> bool:
        try:
            disk.extents(0, BLOCK, 1)
        except EngineError:
            return True
        return False

    def close() -> None:
        wait_until(lambda: pool.lingering() == 1)
        pool.close()
        left_behind.append(pool.lingering())

    def come_late() -> None:
        wait_until(closes)
        try:
            disk.write(BLOCK, half_random(2))
            came_late.append("stored")
        except EngineError as refused:
            came_late.append(str(refused))

    def let_go() -> None:
        wait_until(lambda: bool(came_late) or pool.lingering() == 2)
        for _ in range(2000):  # whoever does not wait for the writer is through by then
            if not left_behind:
                time.sleep(0)
        pool.test_locks()

    in_threads(lambda: disk.write(0, half_random(3)), close, come_late, let_go)
    assert "its pool was closed" in came_late[0]
    assert left_behind == [0]


def test_exports_are_deleted_and_shrunk_under_writers(tmp_path: Path) -> None:
    """A write to what is gone fails, or is behind an end that is nobody's: nothing of it stays."""
    pool = Pool(path=str(tmp_path / "arena"))
    pool.test_locks(pause=True)

    def live(seed: int) -> None:
        for turn in range(15):
            disk = pool.create(f"disk {seed} {turn}", LEAF)
            disk.write(0, half_random(seed) * 64)

            def write(disk: Disk = disk) -> None:
                with contextlib.suppress(EngineError, ValueError):
                    for block in range(64):
                        disk.write(block * BLOCK, half_random(block))

            def end(disk: Disk = disk, turn: int = turn) -> None:
                if turn % 2:
                    disk.resize(16 * BLOCK)
                    assert disk.stats().stored <= 16 * BLOCK
                pool.delete(disk)

            in_threads(write, end)

    in_threads(*(partial(live, seed) for seed in range(3)))
    pool.check()
    stats = pool.stats()
    assert (stats.objects, stats.handles, stats.mem_used_total, stats.orig_data_size) == (0, 0, 0, 0)
