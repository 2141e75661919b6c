"""What a disk is from its making to its end: shrunk, grown, deleted, its place used again, its pool closed."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdzram.engine.arena import fail_allocation
from nbdzram.engine.check import Check
from nbdzram.engine.disk import OFFLOAD_SIZE, Disk, Extent, offload_from
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.scrub import Scrub
from nbdzram.errors import EngineError, PoolFull
from tests.support.lingering import lingering
from tests.support.threads import in_threads, wait_until
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

MIB = 1 << 20
LEAF = 2 * MIB


@pytest.fixture(autouse=True)
def as_usual() -> Iterator[None]:
    yield
    fail_allocation(-1)
    offload_from(OFFLOAD_SIZE)


# -- cleared -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, MIB, LEAF, LEAF + 512, 2 * LEAF + 5 * BLOCK + 1024])
def test_a_disk_that_is_cleared_holds_nothing_also_where_its_last_block_is_none_whole(size: int) -> None:
    pool = Pool()
    disk = pool.create("disk", size)
    disk.write(0, (half_random(1) * (3 * LEAF // BLOCK))[:size])
    twin = pool.clone(disk, "twin")
    disk.clear()
    assert (disk.read(0, size), disk.stats().stored) == (bytes(size), 0)
    assert twin.read(0, 512) == half_random(1)[:512]
    twin.clear()
    assert pool.stats().objects == 0
    pool.check()


def test_a_disk_is_cleared_or_that_is_said_not_to_be() -> None:
    """A trim may keep what it has no room to let go of, and says nothing; whoever empties a disk wants to know."""
    pool = Pool()
    disk = pool.create("disk", LEAF + MIB)
    disk.write(0, half_random(1) * ((LEAF + MIB) // BLOCK))
    twin = pool.clone(disk, "twin")
    pool.mem_limit = BLOCK
    with pytest.raises(PoolFull, match=f"cannot clear {LEAF + MIB} bytes at 0 of export 'disk'"):
        disk.clear()
    pool.mem_limit = 0
    disk.clear()
    assert disk.read(0, LEAF + MIB) == bytes(LEAF + MIB)
    assert twin.read(0, BLOCK) == half_random(1)
    pool.check()


# -- shrinking ---------------------------------------------------------------------------------------------------------


def test_a_full_pool_is_shrunk_to_make_room() -> None:
    pool = Pool()
    disk = pool.create("disk", 32 * BLOCK)
    disk.write(0, b"".join(noise(number) for number in range(32)))
    pool.mem_limit = pool.stats().memory_used
    with pytest.raises(PoolFull):
        disk.write(100, b"there is no room")
    disk.resize(10 * BLOCK + 100)
    assert pool.stats().orig_data_size == 11 * BLOCK
    disk.resize(32 * BLOCK)
    kept = b"".join(noise(number) for number in range(10)) + noise(10)[:100]
    assert disk.read(0, 32 * BLOCK) == kept.ljust(32 * BLOCK, b"\0")
    pool.check()


def test_a_shrink_without_a_byte_to_spare_is_true_and_growing_again_shows_nothing_old(tmp_path: Path) -> None:
    """The last block keeps its beginning and needs a new place, and there is none until the limit is gone."""
    pool = Pool(path=str(tmp_path / "arena"))
    disk = pool.create("disk", BLOCK)
    disk.write(0, noise(1))
    pool.mem_limit = BLOCK
    disk.resize(100)
    assert (disk.size_bytes, disk.read(0, 100)) == (100, noise(1)[:100])
    with pytest.raises(PoolFull, match="cannot grow export 'disk' to 4096 bytes"):
        disk.resize(BLOCK)
    assert disk.size_bytes == 100
    pool.check()
    pool.close()
    with Pool(path=str(tmp_path / "arena")) as again:
        (disk,) = again.disks()
        disk.resize(BLOCK)
        assert disk.read(0, BLOCK) == noise(1)[:100].ljust(BLOCK, b"\0")
        again.check()


@pytest.mark.parametrize("size", [0, 100, LEAF, LEAF + 5 * BLOCK, LEAF + 5 * BLOCK + 7, 3 * LEAF])
def test_a_shrink_at_any_failing_allocation_leaves_nothing_to_grow_into(size: int) -> None:
    """What a clone shares is copied where the new end cuts through it; each copy may find no memory."""
    content = half_random(1) * (2 * LEAF // BLOCK)
    for countdown in range(12):
        pool = Pool()
        disk = pool.create("disk", 3 * LEAF)
        disk.write(0, content)
        twin = pool.clone(disk, "twin")
        fail_allocation(countdown)
        disk.resize(size)
        fail_allocation(-1)
        assert disk.size_bytes == size
        pool.check()
        disk.resize(3 * LEAF)
        assert disk.read(0, 3 * LEAF) == content[:size].ljust(3 * LEAF, b"\0")
        assert twin.read(0, 2 * LEAF) == content
        pool.check()


def test_a_clone_of_an_export_that_could_not_be_cleared_shows_nothing_old_either() -> None:
    pool = Pool()
    disk = pool.create("disk", BLOCK)
    disk.write(0, noise(1))
    pool.mem_limit = BLOCK
    disk.resize(100)
    twin = pool.clone(disk, "twin")
    pool.mem_limit = 0
    twin.resize(BLOCK)
    assert twin.read(0, BLOCK) == noise(1)[:100].ljust(BLOCK, b"\0")
    assert disk.size_bytes == 100
    pool.check()


def test_a_write_that_was_judged_by_an_earlier_size_stores_nothing_behind_the_end() -> None:
    pool = Pool()
    disk = pool.create("disk", 2 * LEAF)
    pool.test_locks(pause=True)
    offload_from(0)
    over, begun = threading.Event(), threading.Event()

    def write(seed: int) -> None:
        """So long that the export shrinks while it goes on."""
        content = half_random(seed, 300) * (LEAF // BLOCK - 2) + b"and a part"
        while not over.is_set():
            begun.set()
            with contextlib.suppress(ValueError):
                disk.write(LEAF + seed, content)

    def resize() -> None:
        try:
            for _ in range(60):
                begun.clear()
                disk.resize(2 * LEAF)
                begun.wait()
                disk.resize(LEAF + 1000)
                pool.check()
        finally:
            over.set()

    in_threads(resize, *(lambda seed=seed: write(seed) for seed in range(2)))
    disk.resize(LEAF + 1000)
    disk.resize(2 * LEAF)
    assert disk.read(LEAF + 1000, LEAF - 1000) == bytes(LEAF - 1000)
    pool.check()


# -- deletion ----------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Pool, Disk], object]] = {
    "read": lambda _, disk: disk.read(0, BLOCK),
    "write": lambda _, disk: disk.write(0, noise(9)),
    "write of a part": lambda _, disk: disk.write(7, b"part"),
    "trim": lambda _, disk: disk.trim(0, 4 * MIB),
    "zero": lambda _, disk: disk.zero(0, 4 * MIB),
    "zero without holes": lambda _, disk: disk.zero(0, 4 * MIB, no_hole=True),
    "extents": lambda _, disk: disk.extents(0, 4 * MIB, 100),
    "grow": lambda _, disk: disk.resize(8 * MIB),
    "shrink": lambda _, disk: disk.resize(1 * MIB),
    "clone": lambda pool, disk: pool.clone(disk, "of the dead"),
    "delete": lambda pool, disk: pool.delete(disk),
}


@pytest.mark.parametrize("use", USES)
def test_a_deleted_disk_is_gone_and_nobody_elses(use: str) -> None:
    """Its place in the directory is another's at once, unless somebody still has it in hand."""
    pool = Pool()
    disk = pool.create("deleted", 4 * MIB)
    disk.write(0, text(1) * 16)
    pool.delete(disk)
    other = pool.create("other", 4 * MIB)
    content = b"".join(half_random(number) for number in range(16)).ljust(4 * MIB, b"\0")
    other.write(0, content)
    with pytest.raises(EngineError, match="it was deleted"):
        USES[use](pool, disk)
    assert other.read(0, 4 * MIB) == content
    assert other.size_bytes == 4 * MIB
    assert [each.name for each in pool.disks()] == ["other"]
    assert disk.usage().stored == disk.stats().stored == 0
    pool.check()


def test_a_place_in_the_directory_is_used_again_when_nobody_has_its_disk_in_hand() -> None:
    pool = Pool()
    disk = pool.create("one", MIB)
    number = disk.number
    pool.delete(disk)
    assert pool.create("two", MIB).number != number
    del disk
    assert pool.create("three", MIB).number == number


@pytest.mark.parametrize("use", USES)
def test_a_disk_of_a_closed_pool_refuses_everything(use: str) -> None:
    pool = Pool()
    disk = pool.create("disk", 4 * MIB)
    disk.write(0, text(1))
    pool.close()
    with pytest.raises(EngineError, match="its pool was closed"):
        USES[use](pool, disk)
    with pytest.raises(EngineError, match="its pool was closed"):
        pool.create("new", MIB)


def test_another_pools_disk_is_refused() -> None:
    pool, other = Pool(), Pool()
    disk = other.create("disk", MIB)
    pool.create("disk", MIB)
    for call in (lambda: pool.delete(disk), lambda: pool.clone(disk, "twin")):
        with pytest.raises(ValueError, match="none of this pool's"):
            call()
    assert len(pool.disks()) == len(other.disks()) == 1


def test_disks_deleted_beside_their_users_leave_every_other_as_it_is() -> None:
    """Readers, writers and walkers go on with a disk whose place is another's before they notice."""
    pool = Pool()
    pool.test_locks(pause=True)
    offload_from(0)
    kept = pool.create("kept", 4 * MIB)
    content = b"".join(half_random(number, 500) for number in range(64))
    kept.write(0, content)
    over = threading.Event()
    current = [pool.create("0", 4 * MIB)]

    def come_and_go() -> None:
        try:
            for number in range(1, 60):
                fresh = pool.create(str(number), 4 * MIB)
                fresh.write(0, text(number) * 20)
                old, current[0] = current[0], fresh
                pool.delete(old)
        finally:
            over.set()

    def use(seed: int) -> None:
        choose = random.Random(seed)
        while not over.is_set():
            try:
                USES[choose.choice(("read", "write", "write of a part", "trim", "zero", "extents"))](pool, current[0])
            except EngineError as error:
                assert "it was deleted" in str(error)

    in_threads(come_and_go, lambda: use(1), lambda: use(2))
    assert kept.read(0, len(content)) == content
    pool.check()


# -- closing -----------------------------------------------------------------------------------------------------------


RUNS: dict[str, Callable[[Pool], Fold | Compact | Recompress | Check]] = {
    "fold": Fold,
    "compact": Compact,
    "recompress": Recompress,
    "check": Check,
}
LONG: dict[str, Callable[[Pool, Disk], object]] = {
    "delete": lambda pool, disk: pool.delete(disk),
    "shrink": lambda _, disk: disk.resize(MIB),
    "trim": lambda _, disk: disk.trim(0, disk.size_bytes),
    "write": lambda _, disk: disk.write(0, noise(1) * 4096),
    "usage": lambda _, disk: disk.usage(),
}


@pytest.mark.parametrize("what", [*RUNS, *LONG])
def test_an_arena_is_let_go_only_when_nobody_is_in_it(tmp_path: Path, what: str) -> None:
    """As soon as close() returns, another may open the file: it holds what was answered, and nobody changes it."""
    path = tmp_path / "arena"
    content = b"".join(half_random(number % 700, 200) for number in range(1024))
    for _ in range(3):
        pool = Pool(path=str(path))
        kept, disk = pool.create("kept", 16 * MIB), pool.create("disk", 16 * MIB)
        kept.write(0, content)
        disk.write(0, content * 4)
        disk.trim(0, MIB)
        begun = threading.Event()
        going = RUNS[what](pool) if what in RUNS else None

        def work(pool: Pool = pool, disk: Disk = disk, begun: threading.Event = begun, going: Any = going) -> None:
            begun.set()
            try:
                LONG[what](pool, disk) if going is None else run(going, 1 << 20)
            except EngineError as error:
                assert "closed" in str(error)

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        while going is not None and going.done == 0 and thread.is_alive():
            pass  # until it is in the middle: a step of this budget gives the interpreter lock away, and no sign
        pool.close()
        before = path.read_bytes()
        thread.join()
        assert before == path.read_bytes()
        with Pool(path=str(path)) as again:
            again.check()
            assert next(each for each in again.disks() if each.name == "kept").read(0, len(content)) == content
        path.unlink()


def grow_old(pool: Pool) -> None:
    """Entries of that age are made younger, those of 64 pages at a time."""
    for _ in range(100):
        pool.set_clock(20 * 86400 + 10 * 3600)


LOOKS: dict[str, Callable[[Pool], object]] = {
    "counters": lambda pool: pool.stats(),
    "the most that was used": lambda pool: pool.reset_mem_used_max(),
    "the clock": grow_old,
    "a check": Check,
    "a scrub": Scrub,
}


@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_at_a_closed_pool_changes_nothing_in_its_file(tmp_path: Path, look: str) -> None:
    """What is still to be taken back of what went would be written where another process stores something by now."""
    path = tmp_path / "arena"
    pool = Pool(path=str(path))
    disk = pool.create("disk", MIB)
    disk.write(0, b"".join(half_random(number, 1500) for number in range(MIB // BLOCK)))
    for block in range(0, MIB // BLOCK, 2):
        disk.trim(block * BLOCK, BLOCK)
    pool.close()
    before = path.read_bytes(), path.stat().st_blocks
    LOOKS[look](pool)
    assert (path.read_bytes(), path.stat().st_blocks) == before


def test_a_trim_goes_when_its_pool_closes() -> None:
    """What is still to be trimmed may take long; who closes waits for the leaf under way, and no more."""
    pool = Pool()
    disk, other = pool.create("disk", 4 * LEAF), pool.create("other", MIB)
    disk.write(0, half_random(1) * (4 * LEAF // BLOCK))

    def trim() -> None:
        with pytest.raises(EngineError, match="its pool was closed"):
            disk.trim(0, 4 * LEAF)

    def is_closing() -> bool:
        try:
            other.write(0, b"no")
        except EngineError:
            return True
        return False

    def close_behind_it() -> None:
        closing.start()
        wait_until(is_closing)

    closing = threading.Thread(target=pool.close)
    lingering(pool, "end_look", trim, close_behind_it)
    closing.join()


# -- nobody has it any more --------------------------------------------------------------------------------------------


def collect(make: Callable[[], object]) -> None:
    """Let go of what is made, which only a cycle leads to then: Python's collector ends it."""
    cycle = [make()]
    cycle.append(cycle)
    del cycle
    gc.collect()


def test_the_place_of_a_disk_in_a_cycle_is_anothers_once_that_is_collected() -> None:
    pool = Pool()

    def deleted() -> Disk:
        disk = pool.create("disk", MIB)
        pool.delete(disk)
        return disk

    collect(deleted)
    assert pool.create("next", MIB).number == 0


def gappy() -> Pool:
    """A pool with zspages that can be emptied."""
    pool = Pool()
    disk = pool.create("disk", 4 * MIB)
    for block in range(1024):
        disk.write(block * BLOCK, half_random(block, 1500))
    for block in range(0, 1024, 3):
        disk.trim(block * BLOCK, BLOCK)
    return pool


def begun(task: Compact | Check) -> Compact | Check:
    task.step(10)
    return task


def test_a_pass_of_compaction_in_a_cycle_ends_once_that_is_collected() -> None:
    pool = gappy()
    collect(lambda: begun(Compact(pool)))
    assert run(Compact(pool)).objects_moved > 0  # all that is to be done, and nothing is left to whoever comes next


def test_a_check_in_a_cycle_keeps_nobody_from_writing_beside_others_once_that_is_collected() -> None:
    pool = gappy()
    collect(lambda: begun(Check(pool, contents=False)))
    (disk,) = pool.disks()
    before = pool.taken_alone()[0]
    disk.write(0, half_random(3000, 1500))
    disk.write(0, half_random(3001, 1500))
    assert pool.taken_alone()[0] == before
    pool.check()


@pytest.mark.parametrize("task", [Compact, Check])
def test_a_run_is_collected_with_its_pool_and_all_addresses_of_that(task: type[Compact | Check]) -> None:
    def whole() -> object:
        pool = gappy()
        return [pool, *pool.disks(), begun(task(pool))]

    def addresses() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * BLOCK

    before = addresses()
    collect(whole)
    assert addresses() < before + (1 << 30)  # a pool reserves many times that


# -- memory ------------------------------------------------------------------------------------------------------------


def test_nodes_that_name_nothing_any_more_are_freed() -> None:
    pool = Pool()
    disk = pool.create("disk", 1 << 46)
    before = pool.stats().metadata
    for offset in range(0, 1 << 46, 1 << 40):
        disk.write(offset, text(1))
        disk.trim(offset, BLOCK)
    assert pool.stats().metadata <= before + (128 << 10)  # what counts parents stays resident
    assert disk.extents(0, 1 << 46, 10) == [(1 << 46, Extent.HOLE | Extent.ZERO)]
    pool.check()


def test_a_write_that_found_no_room_leaves_no_node_behind() -> None:
    pool = Pool()
    disk = pool.create("disk", 1 << 46)
    disk.write(0, noise(1))
    pool.mem_limit = pool.stats().memory_used + 2 * BLOCK  # for some of the nodes
    before = pool.stats().metadata
    for offset in range(1 << 40, 1 << 46, 1 << 40):
        with pytest.raises(PoolFull):
            disk.write(offset, noise(2))
    assert pool.stats().metadata <= before + (128 << 10)
    pool.check()


@pytest.mark.parametrize("left", [0, 1, 255, 256, 300, 511])
def test_a_trim_keeps_a_leaf_of_which_one_block_is_left(left: int) -> None:
    pool = Pool()
    disk = pool.create("disk", LEAF)
    disk.write(0, text(1) * 512)
    disk.trim(0, left * BLOCK)
    disk.trim((left + 1) * BLOCK, (511 - left) * BLOCK)
    assert disk.read(0, LEAF) == (bytes(left * BLOCK) + text(1)).ljust(LEAF, b"\0")
    pool.check()


def test_who_trims_shuts_out_nobody_but_to_give_a_leaf_back() -> None:
    """What is trimmed a block at a time beside a writer, as a file system discards, does not have it wait."""
    pool = Pool()
    disk = pool.create("disk", 2 * LEAF)
    disk.write(0, b"".join(half_random(number) for number in range(600)) + bytes([7]) * 100 * BLOCK)
    pool.stats()  # the index has room for what is stored, and need not be cut while so little goes
    pool.test_locks(watch=True)
    disk.trim(0, 40 * BLOCK)
    disk.trim(600 * BLOCK, 100 * BLOCK)
    assert pool.longest_holds()["pool"] == (0, "")
    disk.trim(40 * BLOCK, 472 * BLOCK)
    assert pool.longest_holds()["pool"] > (0, "")
    assert disk.usage().stored == 88 * BLOCK
    pool.check()


def test_a_trim_frees_only_nodes_that_are_empty() -> None:
    pool = Pool()
    disk = pool.create("disk", 1 << 46)
    twin = None
    offsets = [0, BLOCK, LEAF, 1 << 31, (1 << 31) + LEAF, 1 << 41, (1 << 46) - BLOCK]
    for number, offset in enumerate(offsets):
        disk.write(offset, half_random(number))
    twin = pool.clone(disk, "twin")
    for number, offset in enumerate(offsets):
        disk.trim(offset, LEAF if offset % LEAF == 0 and number % 2 else BLOCK)
        left = offsets[number + 1 :] if number != 1 else offsets[2:]
        for later in left:
            assert disk.read(later, BLOCK) == half_random(offsets.index(later)), (number, later)
        pool.check()
    for number, offset in enumerate(offsets):
        assert twin.read(offset, BLOCK) == half_random(number)
    pool.delete(disk)
    pool.check()
