"""Several threads at once: every block behaves like a register, and housekeeping changes nothing that is read.

Each block holds a number: a write stores a new one, a read returns one. For a register to be linearizable, a read must
return a number whose write had begun before the read ended, and no number that had been overwritten (by a write that
finished) before the read began. Writers of one block take turns, so "overwritten" is a matter of the order of numbers.

A request up to OFFLOAD_SIZE keeps the interpreter lock, and then no two would ever meet: here every one gives it away
(offload_from). Where a mistake needs a thread between two of another's steps, threads step aside at the locks
(Pool.test_locks).
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
from collections.abc import Callable
from functools import partial

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import pause_at_publish
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import EngineError, PoolFull
from tests.support.lingering import lingering
from tests.support.threads import in_threads
from tests.unit.engine.blocks import BLOCK, run

GROUPS = 4
GROUP_BLOCKS = 20
BLOCKS = GROUPS * GROUP_BLOCKS
WRITES = 1000
PATIENCE_SECONDS = 30  # for a thread that never comes

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def numbered(number: int) -> bytes:
    """A block whose every part says `number`; its kind depends on the number, so that every path is taken."""
    word = struct.pack("<Q", number)
    match number % 4:
        case 0:
            return word * (BLOCK // 8)  # same-filled
        case 1:
            return (word + b"compresses well ") * (BLOCK // 24) + word * 2
        case 2:
            return word + random.Random(number).randbytes(BLOCK - 16) + word  # huge
        case _:
            return word + random.Random(number % 40).randbytes(2000) + bytes(BLOCK - 2016) + word


def number_of(block: bytes) -> int:
    """What numbered() was called with; holes are 0. Fails on a mixture."""
    number: int = struct.unpack_from("<Q", block)[0]
    assert block == (numbered(number) if number else bytes(BLOCK)), f"a block that begins with {number} is a mixture"
    return number


@pytest.mark.parametrize("inline_dedup", [False, True])
def test_blocks_are_linearizable_while_the_pool_is_folded_and_compacted(inline_dedup: bool) -> None:
    pool = Pool(inline_dedup=inline_dedup)
    disk = pool.create("disk", BLOCKS * BLOCK)
    begun = [0] * GROUPS  # the highest number whose write began, and whose write finished
    done = [0] * GROUPS
    over = threading.Event()
    turns = [threading.Lock() for _ in range(GROUPS)]

    def write(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(WRITES):
            group = choose.randrange(GROUPS)
            with turns[group]:
                begun[group] += 1
                disk.write(group * GROUP_BLOCKS * BLOCK, numbered(begun[group]) * GROUP_BLOCKS)
                done[group] = begun[group]

    def read() -> None:
        while not over.is_set():
            before = list(done)
            content = disk.read(0, BLOCKS * BLOCK)
            after = list(begun)
            for block in range(BLOCKS):
                number = number_of(content[block * BLOCK : (block + 1) * BLOCK])
                assert before[block // GROUP_BLOCKS] <= number <= after[block // GROUP_BLOCKS]

    def keep_house() -> None:
        while not over.is_set():
            run(Fold(pool), 20)
            run(Compact(pool), 20)
            run(Recompress(pool), 20)
            run(Check(pool), 20)

    def write_all() -> None:
        try:
            in_threads(lambda: write(1), lambda: write(2))
        finally:
            over.set()

    in_threads(write_all, read, read, keep_house)
    for group in range(GROUPS):
        for block in range(GROUP_BLOCKS):
            assert number_of(disk.read((group * GROUP_BLOCKS + block) * BLOCK, BLOCK)) == done[group]
    pool.check()


def test_partial_writes_to_one_block_never_lose_each_others_bytes() -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    pool.test_locks(pause=True)
    threads, rounds = 4, 300
    part = BLOCK // threads

    def write(thread: int) -> None:
        for turn in range(rounds):
            disk.write(thread * part, bytes([turn % 251 + 1]) * part)
            found = disk.read(thread * part, part)
            assert found == bytes([turn % 251 + 1]) * part

    in_threads(*(lambda thread=thread: write(thread) for thread in range(threads)))
    assert disk.read(0, BLOCK) == bytes([(rounds - 1) % 251 + 1]) * BLOCK


def test_a_write_of_a_part_never_brings_back_what_a_whole_write_replaced() -> None:
    """It reads the block, and stores it changed: nobody may replace the block in between."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    pool.test_locks(pause=True)
    rounds = 400
    over = threading.Event()

    def write_whole() -> None:
        try:
            for turn in range(1, rounds):
                disk.write(0, struct.pack("<Q", turn) * (BLOCK // 8))
                assert disk.read(BLOCK // 2, BLOCK // 2) == struct.pack("<Q", turn) * (BLOCK // 16)
                disk.trim(0, BLOCK)
                assert disk.read(BLOCK // 2, BLOCK // 2) == bytes(BLOCK // 2)
        finally:
            over.set()

    def write_part() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            disk.write(8, struct.pack("<Q", turn))

    in_threads(write_whole, write_part, write_part)
    pool.check()


def test_zeroes_of_a_part_and_of_whole_blocks_meet_writes_in_one_leaf() -> None:
    """Four threads, four blocks of one leaf, each kind of change: every block ends as its own thread left it."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    twin = None
    pool.test_locks(pause=True)

    def change(block: int) -> None:
        for turn in range(150):
            disk.write(block * BLOCK, numbered(turn * 4 + block))
            disk.zero(block * BLOCK + 100, 200)
            disk.trim(block * BLOCK, BLOCK)
            assert disk.read(block * BLOCK, BLOCK) == bytes(BLOCK)
            disk.zero(block * BLOCK, BLOCK, no_hole=True)
            disk.write(block * BLOCK, numbered(turn))
            assert number_of(disk.read(block * BLOCK, BLOCK)) == turn

    in_threads(*(lambda block=block: change(block) for block in range(4)))
    twin = pool.clone(disk, "twin")
    assert twin.stats().stored == 4 * BLOCK
    pool.check()


def test_counters_are_those_of_one_moment() -> None:
    """A block is an object or same-filled, and a write that changes which is either before the counters or behind."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    count = 64
    kinds = [b"".join(random.Random(number).randbytes(BLOCK) for number in range(count)), bytes([7]) * BLOCK * count]
    disk.write(0, kinds[0])
    pause_at_publish(True)
    over = threading.Event()

    def write() -> None:
        try:
            for turn in range(60):
                disk.write(0, kinds[turn % 2])
        finally:
            over.set()

    def look() -> None:
        while not over.is_set():
            stats = pool.stats()
            assert stats.objects + stats.same_pages == count
            assert stats.orig_data_size == count * BLOCK

    in_threads(write, look)


def test_clones_are_made_between_two_changes_of_their_source() -> None:
    """What a clone counts is what it has."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    pause_at_publish(True)
    over = threading.Event()

    def write() -> None:
        choose = random.Random(1)
        while not over.is_set():
            block = choose.randrange(480)
            disk.write(block * BLOCK, numbered(choose.randrange(1, 60)) * 32)
            disk.trim(choose.randrange(480) * BLOCK, 32 * BLOCK)

    def clone() -> None:
        try:
            for number in range(200):
                twin = pool.clone(disk, f"twin {number}")
                stored = sum(length for length, bits in twin.extents(0, 32 << 20, 1 << 20) if not bits & 1)
                assert twin.stats().stored == stored
                pool.delete(twin)
        finally:
            over.set()

    in_threads(clone, write)
    pool.check()


def test_runs_of_several_threads_take_turns_step_by_step() -> None:
    """Each goes on with what it knows from its last step, and another's would change it under a decoding."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    pool.test_locks(pause=True)
    content = b"".join(half(number % 150) for number in range(600))
    disk.write(0, content)

    def keep_house(kind: Callable[[Pool], Fold | Compact | Recompress]) -> None:
        for turn in range(4):
            disk.write((turn * 120) * BLOCK, content[turn * 120 * BLOCK :][: 100 * BLOCK])
            run(kind(pool), 30)

    in_threads(*(lambda kind=kind: keep_house(kind) for kind in (Fold, Fold, Recompress, Recompress, Compact)))
    assert disk.read(0, len(content)) == content
    run(Fold(pool))
    run(Check(pool))
    assert pool.stats().objects == 150


def half(number: int) -> bytes:
    return random.Random(number).randbytes(1500) + bytes(BLOCK - 1500)


def test_a_handle_that_is_another_objects_by_now_is_not_moved_as_the_old_one() -> None:
    """Compaction looks at a cell before it has the lock; then the object may be gone, and its handle used again."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    pool.test_locks(pause=True)
    over = threading.Event()
    held = 300

    def fresh(number: int) -> bytes:
        return struct.pack("<Q", number) + random.Random(number).randbytes(500 + number % 7 * 400) + bytes(8)

    def write(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for turn in range(1500):
                block = choose.randrange(held) * 2 + seed
                disk.write(block * BLOCK, fresh(turn * 1000 + block).ljust(BLOCK, b"\0"))
                found = disk.read(block * BLOCK, BLOCK)
                assert found == fresh(turn * 1000 + block).ljust(BLOCK, b"\0")
                if choose.random() < 0.5:
                    disk.trim(choose.randrange(held) * 2 * BLOCK + seed * BLOCK, BLOCK)
        finally:
            over.set()

    def compact() -> None:
        while not over.is_set():
            run(Compact(pool), 1 << 20)

    in_threads(lambda: write(0), lambda: write(1), compact)
    run(Check(pool))


def test_a_hundred_threads_decode_at_once_each_by_itself() -> None:
    """A decoder is one thread's, which has it to its end. What is not verified is not decoded again if it is wrong."""
    pool = Pool()
    pool.verify = False
    disk = pool.create("disk", 32 << 20)
    content = b"".join((b"%d prose and verse " % number * 300)[:BLOCK] for number in range(64))
    disk.write(0, content)
    run(Recompress(pool))
    assert pool.stats().compr_by_codec["zstd"] > 0

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(30):
            block = choose.randrange(48)
            assert disk.read(block * BLOCK, 16 * BLOCK) == content[block * BLOCK : (block + 16) * BLOCK]

    in_threads(*(lambda seed=seed: read(seed) for seed in range(100)))


def test_readers_note_the_age_of_what_others_change_copy_and_drop() -> None:
    """Entries are changed by readers too, which take no lock: whoever looks at one looks once (make tsan sees it)."""
    pool = Pool(inline_dedup=True)  # so that writes go alone
    leaf = 512 * BLOCK
    disk = pool.create("disk", 2 * leaf)
    content = b"".join(numbered(number * 4 + 1 + number % 3) for number in range(64))
    disk.write(0, content)
    over = threading.Event()

    def read() -> None:
        clock = 0
        while not over.is_set():
            clock += 3600
            pool.set_clock(clock)
            for each in pool.disks():
                with contextlib.suppress(EngineError):  # a twin may be gone
                    assert each.read(8 * BLOCK, 48 * BLOCK) == content[8 * BLOCK : 56 * BLOCK]

    def change() -> None:
        try:
            for turn in range(60):
                twin = pool.clone(disk, f"twin {turn}")
                twin.quota_bytes = 65 * BLOCK
                twin.write(turn % 8 * BLOCK, numbered(turn + 1))
                twin.write(8 * BLOCK, content[8 * BLOCK : 56 * BLOCK])
                twin.trim(56 * BLOCK, 8 * BLOCK)
                run(Check(pool, contents=False), 200)
                twin.usage()
                pool.delete(twin)
        finally:
            over.set()

    in_threads(read, read, change)
    assert disk.read(0, len(content)) == content
    pool.check()


def test_long_unaligned_writes_of_several_threads_meet_in_shared_blocks() -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    length = 20 * BLOCK + 1000  # above OFFLOAD_SIZE: without the interpreter lock; both ends lie inside a block
    expected = bytearray(8 * length)

    def write(slot: int) -> None:
        for turn in range(25):
            disk.write(slot * length, random.Random(slot * 100 + turn).randbytes(length))

    in_threads(*(lambda slot=slot: write(slot) for slot in range(8)))
    for slot in range(8):
        expected[slot * length : (slot + 1) * length] = random.Random(slot * 100 + 24).randbytes(length)
    assert disk.read(0, 8 * length) == expected
    pool.check()


def test_clones_taken_and_dropped_while_their_source_is_written_are_points_in_time() -> None:
    pool = Pool()
    disk = pool.create("disk", 8 << 20)
    over = threading.Event()

    def write() -> None:
        try:
            for turn in range(1, 120):
                disk.write(0, struct.pack("<Q", turn) * (32 * BLOCK // 8))
                disk.write(1 << 20, random.Random(turn).randbytes(30 * BLOCK))
        finally:
            over.set()

    def clone() -> None:
        number = 0
        while not over.is_set():
            number += 1
            twin = pool.clone(disk, f"twin {number}")
            first = twin.read(0, 2 << 20)
            run(Fold(pool), 50)
            run(Check(pool), 50)
            assert twin.read(0, 2 << 20) == first
            pool.delete(twin)

    in_threads(write, clone)
    assert len(pool.disks()) == 1
    pool.check()


def test_a_leaf_that_several_write_drop_and_delete_at_once_is_each_ones_own_afterwards() -> None:
    """Its copy takes several holds of the lock: the others may change theirs, or go, and a check looks between them."""
    pool = Pool()
    pool.test_locks(pause=True)
    leaf = 512 * BLOCK
    content = b"".join(numbered(number + 1) for number in range(512))
    disk = pool.create("disk", 2 * leaf)
    disk.write(0, content)
    over = threading.Event()

    def live(seed: int) -> None:
        choose = random.Random(seed)
        for turn in range(80):
            twin = pool.clone(disk, f"twin {seed} {turn}")
            block = choose.randrange(512)
            match choose.randrange(4):
                case 0:
                    twin.write(block * BLOCK, numbered(turn + 1))
                    assert twin.read(block * BLOCK, BLOCK) == numbered(turn + 1)
                case 1:
                    twin.trim(block * BLOCK, BLOCK)
                    assert twin.stats().stored == 511 * BLOCK
                case 2:
                    twin.trim(0, leaf)
                    assert twin.stats().stored == 0
                case _:
                    in_threads(partial(write_or_be_gone, twin, block), partial(pool.delete, twin))
                    continue
            pool.delete(twin)

    def write_or_be_gone(twin: Disk, block: int) -> None:
        with contextlib.suppress(EngineError):
            twin.write(block * BLOCK, numbered(1))

    def live_all() -> None:
        try:
            in_threads(*(lambda seed=seed: live(seed) for seed in range(3)))
        finally:
            over.set()

    def check() -> None:
        while not over.is_set():
            run(Check(pool, contents=False), 100)

    in_threads(live_all, check)
    assert disk.read(0, leaf) == content
    pool.check()
    objects = pool.stats().objects
    pool.delete(disk)
    assert objects
    assert pool.stats().objects == 0
    assert pool.stats().orig_data_size == 0


@pytest.mark.parametrize("gone", ["the suspect", "the other"])
def test_an_object_that_goes_while_a_fold_decodes_it_is_folded_with_nothing(gone: str) -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    content = half(1)
    disk.write(0, content)
    run(Recompress(pool))  # so that the bytes differ, and both are decoded
    disk.write(BLOCK, content)
    lingering(pool, "_same_block", lambda: run(Fold(pool)), lambda: disk.trim(BLOCK * (gone == "the suspect"), BLOCK))
    pool.check()
    assert pool.stats().objects == 1
    assert disk.read(BLOCK * (gone == "the other"), BLOCK) == content
    disk.trim(0, 2 * BLOCK)
    assert pool.stats().objects == 0


def test_an_object_that_goes_while_it_is_recompressed_is_not_stored_again() -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    disk.write(0, half(1))
    task = Recompress(pool)
    lingering(pool, "_visit", lambda: run(task), lambda: disk.trim(0, BLOCK))
    assert task.report().objects_recompressed == 0
    assert pool.stats().objects == 0
    pool.check()


def test_the_sum_over_many_exports_is_that_of_one_moment() -> None:
    """A check adds them up a few at a time, and is told what is stored, trimmed, cloned or deleted meanwhile."""
    pool = Pool()
    pool.test_locks(pause=True)
    disks = [pool.create(f"disk {number}", 1 << 20) for number in range(400)]
    over = threading.Event()

    def change(seed: int) -> None:
        choose = random.Random(seed)
        while not over.is_set():
            disk = choose.choice(disks)
            disk.write(0, numbered(choose.randrange(1, 9)) * 32)
            twin = pool.clone(disk, f"twin {seed}")
            choose.choice(disks).trim(0, 1 << 20)
            pool.delete(twin)

    def check() -> None:
        try:
            for _ in range(6):
                run(Check(pool, contents=False), 1 << 16)
        finally:
            over.set()

    in_threads(check, *(partial(change, seed) for seed in range(3)))
    pool.check()


def test_counters_runs_and_deletions_of_several_threads_never_wait_for_each_other_for_ever() -> None:
    """Each asks for the interpreter lock and for the pool's; in two orders, they would stop for good."""
    pool = Pool()
    disk = pool.create("disk", 8 << 20)
    disk.write(0, random.Random(1).randbytes(2 << 20))
    over = threading.Event()

    def come_and_go() -> None:
        try:
            for number in range(300):
                twin = pool.clone(disk, f"twin {number}")
                twin.write(number * BLOCK, random.Random(number).randbytes(20 * BLOCK))
                pool.delete(twin)
        finally:
            over.set()

    def look() -> None:
        while not over.is_set():
            Fold(pool).step(10)
            pool.stats()
            disk.stats()

    def check() -> None:
        while not over.is_set():
            run(Check(pool), 1000)

    in_threads(come_and_go, look, look, check)
    pool.check()


def test_a_check_beside_writes_that_hold_what_they_found_never_complains() -> None:
    """With inline folding an object has a holder before an entry names it, also while a check walks the entries."""
    pool = Pool(inline_dedup=True)
    disk = pool.create("disk", 16 << 20)
    known = [struct.pack("<Q", number) + random.Random(number).randbytes(1000) + bytes(3088) for number in range(2000)]
    disk.write(0, b"".join(known))
    over = threading.Event()

    def write() -> None:
        choose = random.Random(1)
        try:
            for _ in range(1500):
                disk.write(choose.randrange(2000, 4000) * BLOCK, b"".join(choose.sample(known, 40)))
        finally:
            over.set()

    def check() -> None:
        while not over.is_set():
            run(Check(pool, contents=False), 1000)

    in_threads(write, check)
    assert pool.stats().objects == 2000
    pool.check()


def test_a_full_pool_under_threads_refuses_and_keeps_what_it_has() -> None:
    pool = Pool(mem_limit=1 << 20)
    disks = [pool.create(f"disk {number}", 4 << 20) for number in range(3)]

    def write(number: int) -> None:
        choose = random.Random(number)
        for turn in range(200):
            offset = choose.randrange(40) * 20 * BLOCK
            try:
                disks[number].write(offset, random.Random(turn).randbytes(20 * BLOCK))
            except PoolFull:
                disks[number].trim(choose.randrange(40) * 20 * BLOCK, 200 * BLOCK)

    in_threads(*(lambda number=number: write(number) for number in range(3)))
    assert pool.stats().failed_writes > 0
    pool.check()
