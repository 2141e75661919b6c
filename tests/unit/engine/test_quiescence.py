"""What is freed is used again only when no reader can see it any more: slots, handles, nodes, and their pages.

`stay_online` makes a thread a reader that has not ended: what there was when it began must stay as it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from nbdzram.engine.disk import OFFLOAD_SIZE, Disk, offload_from
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.quiescence import refuse_watches, stay_online, waiting, watches
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import PoolFull
from tests.support.threads import in_threads
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

LEAF = 512 * BLOCK


@pytest.fixture(autouse=True)
def small_requests_meet_too() -> Iterator[None]:
    offload_from(0)
    yield
    offload_from(OFFLOAD_SIZE)


@contextmanager
def a_reader() -> Iterator[None]:
    """Somebody reads meanwhile, in a thread of its own."""
    begun, over = threading.Event(), threading.Event()

    def read() -> None:
        stay_online(True)
        begun.set()
        over.wait()
        stay_online(False)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def pages(pool: Pool) -> int:
    return pool.stats().mem_used_total // BLOCK


def metadata(pool: Pool) -> int:
    return pool.stats().metadata // BLOCK


def trimmed(disk: Disk) -> None:
    disk.trim(0, 8 * BLOCK)


def overwritten(disk: Disk) -> None:
    disk.write(0, bytes([1]) * (8 * BLOCK))


def deleted(disk: Disk) -> None:
    disk.pool.delete(disk)


def test_a_thread_that_there_is_no_memory_to_watch_reads_and_writes_all_the_same() -> None:
    """By the locks; requests of several blocks too, which begin and end within one."""
    disk = Pool().create("disk", LEAF)
    repeating = b"\7" * BLOCK + b"a word of its own".center(8)[:8] * (BLOCK // 8)
    kept = bytearray(b"".join(half_random(number) for number in range(80)) + repeating)
    disk.write(0, kept)
    kept += bytes(BLOCK)  # nothing was written there

    def unwatched() -> None:
        parts = [(81 * BLOCK + 3, 13), (81 * BLOCK - 5, BLOCK + 9), (82 * BLOCK + 3, 5), (80 * BLOCK + 1, 2)]
        for start, length in (*parts, (100, 77 * BLOCK), (3 * BLOCK - 1, 2), (5 * BLOCK, BLOCK), (0, len(kept))):
            assert disk.read(start, length) == kept[start : start + length]
        for start, content in ((7 * BLOCK + 9, noise(1) + text(2)), (20 * BLOCK, prose(3)), (30, b"odd")):
            disk.write(start, content)
            kept[start : start + len(content)] = content
        disk.trim(40 * BLOCK - 8, 2 * BLOCK)
        kept[40 * BLOCK : 41 * BLOCK] = bytes(BLOCK)
        assert disk.read(0, len(kept)) == kept

    watched = watches()
    refuse_watches(True)
    try:
        in_threads(unwatched)
    finally:
        refuse_watches(False)
    assert watches() == watched
    assert disk.read(0, len(kept)) == kept
    disk.pool.check()


@pytest.mark.parametrize("way", [trimmed, overwritten, deleted])
def test_pages_of_what_goes_stay_used_until_nobody_reads(way: Callable[[Disk], None]) -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, b"".join(noise(number) for number in range(8)))
    with a_reader():
        way(disk)
        assert pages(pool) == 8
    assert pages(pool) == 0
    pool.check()


def test_what_nobody_reads_is_free_as_soon_as_somebody_asks() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    for number in range(20):
        disk.write(number * BLOCK, half_random(number))
    before = metadata(pool)
    disk.trim(0, 20 * BLOCK)
    assert pages(pool) == 0
    assert metadata(pool) == before - 5, "the leaf, and the four nodes above it"


def test_a_slot_is_not_written_while_somebody_reads() -> None:
    """Free slots are linked through their bytes, and the next object is written into them."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    for number in range(16):
        disk.write(number * BLOCK, half_random(number))
    full = pages(pool)
    with a_reader():
        disk.trim(0, 16 * BLOCK)
        for number in range(16):
            disk.write(number * BLOCK, half_random(100 + number))
        assert pages(pool) >= 2 * full - 1, "none of the slots was used twice"
        pool.check()
    pool.check()


@pytest.mark.parametrize("trims", [False, True], ids=["overwritten", "trimmed"])
def test_a_handle_is_not_another_objects_while_somebody_reads(trims: bool) -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, noise(0))

    def write_again(end: bytes) -> None:
        for number in range(3 * 256):  # cells of three pages
            disk.write(0, number.to_bytes(8, "little") * (BLOCK // 16) + bytes(BLOCK // 2 - 1) + end)
            if trims:
                disk.trim(0, BLOCK)

    disk.write(BLOCK, noise(1))  # the leaf stays
    before = metadata(pool)
    with a_reader():
        write_again(b"1")
        assert metadata(pool) >= before + 3
    more = metadata(pool)
    write_again(b"2")
    assert metadata(pool) == more


def test_a_node_is_not_another_while_somebody_reads() -> None:
    pool = Pool()
    disk = pool.create("disk", 64 * LEAF)
    disk.write(0, noise(0))
    before = metadata(pool)
    with a_reader():
        for number in range(1, 20):
            disk.write(number * LEAF, bytes([1]) * BLOCK)
            disk.trim(number * LEAF, BLOCK)
        assert metadata(pool) >= before + 19
        pool.check()
    assert metadata(pool) <= before + 1, "the counts of parents may take a page more"


def test_what_a_clone_shared_and_nobody_has_any_more_stays_while_somebody_reads() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, noise(0) + noise(1))
    twin = pool.clone(disk, "twin")
    with a_reader():
        disk.trim(0, LEAF)
        pool.delete(twin)
        assert pages(pool) == 2
    assert pages(pool) == 0


def test_what_goes_while_others_are_waited_for_waits_for_who_reads_then() -> None:
    """A grace period that began before is not its own: its reader came when that was under way already."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, b"".join(noise(number) for number in range(64)))
    with ExitStack() as second:
        with a_reader():
            disk.trim(0, 32 * BLOCK)
            assert pages(pool) == 64  # and the first grace period has begun
            second.enter_context(a_reader())
            disk.trim(32 * BLOCK, 32 * BLOCK)
        assert pages(pool) == 32
    assert pages(pool) == 0


def test_a_thread_that_ends_is_not_waited_for() -> None:
    """Also one that never said that it had ended to read."""
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(0))
    in_threads(lambda: stay_online(True))
    disk.trim(0, BLOCK)
    while pages(pool):  # Python says that a thread has ended shortly before it has
        pass


def test_threads_that_come_and_go_share_their_watches() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)

    def read() -> None:
        disk.read(0, BLOCK)

    in_threads(read, read, read, read)
    known = watches()
    for _ in range(50):
        in_threads(read, read, read, read)
    assert watches() < known + 100


def test_more_threads_than_anybody_counts_on_are_watched_each() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(0))
    meeting = threading.Barrier(301)

    def read() -> None:
        stay_online(True)
        meeting.wait()
        meeting.wait()
        stay_online(False)

    threads = [threading.Thread(target=read) for _ in range(300)]
    for thread in threads:
        thread.start()
    meeting.wait()
    assert watches() >= 300
    disk.trim(0, BLOCK)
    assert pages(pool) > 0
    meeting.wait()
    for thread in threads:
        thread.join()
    assert pages(pool) == 0


def test_who_is_online_twice_reads_until_it_has_ended_both() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(0))
    begun, over = threading.Event(), threading.Event()

    def read() -> None:
        stay_online(True)
        assert disk.read(0, BLOCK) == half_random(0)  # a call within the turn
        begun.set()
        over.wait()
        stay_online(False)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    disk.trim(0, BLOCK)
    before = pages(pool)
    over.set()
    thread.join()
    assert before > 0 == pages(pool)


def test_a_forked_process_does_not_wait_for_its_parents_readers() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(0))
    with a_reader():
        child = os.fork()
        if child == 0:
            disk.trim(0, BLOCK)
            os._exit(0 if pool.stats().mem_used_total == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_within_a_turn_nest_and_each_may_wait_for_the_others() -> None:
    """An I/O thread is online for a turn, and writes in it: it holds nothing then, and never waits for itself."""
    pool, disk, count = filled()
    stay_online(True)
    try:
        for number in range(count, count + 100):
            disk.trim((number - count) * BLOCK, BLOCK)
            disk.write(number * BLOCK, noise(number))
            with pytest.raises(PoolFull):
                disk.write((number + 1) * BLOCK, noise(number))
            assert disk.read(number * BLOCK, BLOCK) == noise(number)
    finally:
        stay_online(False)
    pool.check()


# -- at the limit ----------------------------------------------------------------------------------------------------


def filled(limit: int = 1 << 20) -> tuple[Pool, Disk, int]:
    """A pool without a page of room, and how many blocks it took."""
    pool = Pool(mem_limit=limit)
    disk = pool.create("disk", 64 * LEAF)
    number = 0
    while True:
        try:
            disk.write(number * BLOCK, noise(number))
        except PoolFull:
            return pool, disk, number
        number += 1


def test_a_write_at_the_limit_waits_for_readers_before_it_is_refused() -> None:
    pool, disk, count = filled()
    left = False
    with a_reader():
        disk.trim(0, 4 * BLOCK)

        def write() -> None:
            disk.write(0, noise(count))
            assert left, "there was no room before the reader had gone"

        writer = threading.Thread(target=write)
        failures: list[BaseException] = []
        threading.excepthook, hook = lambda told: failures.append(told.exc_value or Exception()), threading.excepthook
        writer.start()
        while not waiting() and writer.is_alive():  # it found no room, and asks for what was retired
            pass
        left = True
    writer.join()
    threading.excepthook = hook
    assert not failures
    assert disk.read(0, BLOCK) == noise(count)
    pool.check()


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_what_was_trimmed_is_room_at_once(blocks: int) -> None:
    """To the block: what waits for readers is no reason to refuse, and no reason to admit more."""
    pool, disk, count = filled()
    disk.trim(0, blocks * BLOCK)
    for number in range(blocks):
        disk.write((count + number) * BLOCK, noise(count + number))
    with pytest.raises(PoolFull):
        disk.write((count + blocks) * BLOCK, noise(1))
    for number in range(blocks, count + blocks):
        assert disk.read(number * BLOCK, BLOCK) == noise(number)
    pool.check()


def test_a_write_into_a_pool_without_room_is_refused_and_does_not_try_for_ever() -> None:
    """It takes a node, gives that back, and finds it among what was freed: that is no room."""
    pool, disk, _ = filled()
    for more in range(4):  # room for the leaf, and none for the block
        pool.mem_limit += more and BLOCK
        with pytest.raises(PoolFull):
            for number in range(1, 40):
                disk.write(number * LEAF, noise(number))
    pool.check()


def test_who_frees_faster_than_readers_go_waits_for_them() -> None:
    pool = Pool()
    disk = pool.create("disk", 16 * LEAF)
    disk.write(0, b"".join(half_random(number) for number in range(4000)))
    before = pages(pool)
    gone = threading.Event()

    def trim() -> None:
        disk.trim(0, 16 * LEAF)
        gone.set()

    with a_reader():
        thread = threading.Thread(target=trim)
        thread.start()
        while not waiting() and thread.is_alive():
            pass
        assert not gone.is_set()
        assert disk.stats().stored > 2000 * BLOCK
        assert pages(pool) == before
    thread.join()
    assert disk.stats().stored == 0
    assert pages(pool) == 0
    pool.check()


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_fold_tells_the_pages_that_came_back_and_not_those_that_will() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    for number in range(200):
        disk.write(number * BLOCK, half_random(number % 2))
    before = pages(pool)
    report = run(Fold(pool), 1 << 20)
    assert report.pages_returned == before - pages(pool) > 0
    assert pool.stats().pages_folded == report.pages_returned
    pool.check()


def test_compaction_and_recompression_tell_the_pages_that_came_back() -> None:
    pool = Pool()
    disk = pool.create("disk", 4 * LEAF)
    for number in range(1000):
        disk.write(number * BLOCK, prose(number))
    before = pages(pool)
    report = run(Recompress(pool), 1 << 20)
    assert report.pages_returned == before - pages(pool) > 0
    for number in range(1000):
        if number % 5:
            disk.trim(number * BLOCK, BLOCK)
    before = pages(pool)
    compacted = run(Compact(pool), 1 << 20)
    assert compacted.pages_returned == before - pages(pool) > 0
    assert pool.stats().pages_compacted == compacted.pages_returned
    pool.check()


def test_a_recompression_in_a_full_pool_tells_what_was_kept_as_spare_too() -> None:
    """It takes a page for the first object, and there are none but those."""
    pool = Pool(mem_limit=2 << 20)
    disk = pool.create("disk", 64 * LEAF)
    disk.write(0, b"".join(map(prose, range(400))))
    with pytest.raises(PoolFull):
        for number in range(400, 1000):
            disk.write(number * BLOCK, noise(number))
    disk.trim(500 * BLOCK, 8 * BLOCK)
    before = pages(pool)
    report = run(Recompress(pool), 1 << 20)
    assert report.pages_returned == before - pages(pool) > 0
    pool.check()


def test_a_check_counts_what_is_retired() -> None:
    """Slots of all classes that nothing names, and that are not free: neither is an error, while somebody reads."""
    pool = Pool()
    disk = pool.create("disk", 4 * LEAF)
    for number in range(600):
        disk.write(number * BLOCK, (noise, half_random, text)[number % 3](number))
    with a_reader():
        for number in range(0, 600, 2):
            disk.trim(number * BLOCK, BLOCK)
        pool.check()
        assert disk.read(BLOCK, BLOCK) == half_random(1)
    pool.check()


def test_a_pool_is_closed_when_its_readers_have_gone() -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, half_random(0))
    closed = threading.Event()

    def close() -> None:
        pool.close()
        closed.set()

    with a_reader():
        thread = threading.Thread(target=close)
        thread.start()
        while True:
            try:
                disk.read(0, BLOCK)
            except Exception as told:  # noqa: BLE001 -- of an engine that is being closed
                assert "its pool was closed" in str(told)
                break
        assert not closed.is_set()
    thread.join()
