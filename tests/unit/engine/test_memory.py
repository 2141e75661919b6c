"""What a pool's blocks cost: pages are taken late and given back early, and every count of them is what is resident."""

from __future__ import annotations

import contextlib
import gc
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdzram.engine.compact import Compact
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import CompactReport
from nbdzram.errors import PoolFull, UserError
from tests.unit.engine.blocks import BLOCK, half_random, noise, resident_bytes, run, text

SIZE = 64 << 20
SPARE_PAGES = 15  # freed last, beside one another: kept for the next write


def file_pages(path: Path) -> int:
    """Pages that an arena's file takes."""
    return path.stat().st_blocks * 512 // BLOCK


def test_discarded_blocks_that_do_not_compress_give_their_pages_back_one_by_one(tmp_path: Path) -> None:
    """One block of ten is kept: its page is what is left, not the run of pages that it was stored among."""
    with Pool(path=str(tmp_path / "pool")) as pool:
        disk = pool.create("disk", SIZE)
        for number in range(1000):
            disk.write(number * BLOCK, noise(number))
        full = file_pages(tmp_path / "pool")
        for number in range(1000):
            if number % 10:
                disk.trim(number * BLOCK, BLOCK)
        used = pool.stats().mem_used_total // BLOCK
        assert 100 <= used <= 100 + SPARE_PAGES
        assert full - file_pages(tmp_path / "pool") == 1000 - used
        pool.check()
        disk.trim(0, SIZE)
        assert pool.stats().mem_used_total == 0
        assert full - file_pages(tmp_path / "pool") >= 1000
        pool.check()


def test_pages_given_back_before_a_pool_is_opened_again_stay_given_back(tmp_path: Path) -> None:
    """And an opened pool returns what its last process had kept as spare."""
    path = tmp_path / "pool"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", SIZE)
        for number in range(256):
            disk.write(number * BLOCK, noise(number))
        for number in range(256):
            if number % 16 not in (3, 9):
                disk.trim(number * BLOCK, BLOCK)
        spare = pool.stats().mem_used_total // BLOCK - 32  # who asks has what was freed taken back
        before = file_pages(path)
    with Pool(path=str(path)) as pool:
        assert pool.stats().mem_used_total == 32 * BLOCK
        assert before - file_pages(path) == spare
        (disk,) = pool.disks()
        for number in range(256):
            assert disk.read(number * BLOCK, BLOCK) == (noise(number) if number % 16 in (3, 9) else bytes(BLOCK))
        for number in range(256):
            disk.write(number * BLOCK, noise(number + 1000))
        assert 256 <= pool.stats().mem_used_total // BLOCK <= 256 + SPARE_PAGES
        pool.check()


def test_a_block_written_again_uses_the_page_that_was_freed_last() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(noise(number) for number in range(20)))
    for number in range(40):
        disk.write(number % 20 * BLOCK, noise(100 + number))
        assert pool.stats().mem_used_total <= 21 * BLOCK
    assert disk.read(0, 20 * BLOCK) == b"".join(noise(120 + number) for number in range(20))
    pool.check()


@pytest.mark.parametrize("seed", range(4))
def test_pages_of_blocks_that_do_not_compress_are_counted_whatever_comes_and_goes(seed: int) -> None:
    choose = random.Random(seed)
    pool = Pool(mem_limit=600 << 10)
    disk = pool.create("disk", SIZE)
    contents: dict[int, bytes] = {}
    for step in range(1500):
        block = choose.randrange(300)
        if choose.random() < 0.4:
            disk.trim(block * BLOCK, choose.choice((1, 1, 7)) * BLOCK)
            contents = {number: kept for number, kept in contents.items() if disk.read(number * BLOCK, 8) != bytes(8)}
        else:
            content = choose.choice((noise, noise, half_random))(step)
            try:
                disk.write(block * BLOCK, content)
                contents[block] = content
            except PoolFull:
                pass
        if step % 100 == 0:
            pool.check()
    assert all(disk.read(number * BLOCK, BLOCK) == content for number, content in contents.items())
    disk.trim(0, SIZE)
    assert pool.stats().mem_used_total == 0
    pool.check()


def test_a_slot_that_was_free_before_is_used_before_a_page_is_taken() -> None:
    """Also where its zspage is emptier than one that could grow: a write is refused only for want of a page."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    written = 110
    for number in range(written):
        disk.write(number * BLOCK, half_random(number))
    for number in range(0, 60, 2):
        disk.trim(number * BLOCK, BLOCK)
    before = pool.stats().mem_used_total
    for number in range(0, 60, 2):
        disk.write(number * BLOCK, half_random(number + 1000))
        assert pool.stats().mem_used_total == before
    pool.check()


def test_compaction_moves_nothing_where_no_page_is_gained() -> None:
    pool = Pool()
    disk = pool.create("disk", SIZE)
    for number in range(300):
        disk.write(number * BLOCK, noise(number) if number % 2 else half_random(number))
    for number in range(1, 300, 4):
        disk.trim(number * BLOCK, BLOCK)
    assert run(Compact(pool)) == CompactReport(objects_moved=0, pages_returned=0)
    assert run(Compact(pool, dry_run=True)).pages_returned == 0


def test_a_zspage_with_a_free_slot_that_spans_no_page_is_left_alone() -> None:
    """To move the thirty others would gain nothing."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(half_random(number) for number in range(62)))  # two zspages of 31 slots
    assert pool.stats().zspages == 2
    disk.trim(7 * BLOCK, BLOCK)
    assert run(Compact(pool)) == CompactReport(objects_moved=0, pages_returned=0)


def test_tables_cost_a_page_for_two_mebibytes_and_little_beside() -> None:
    pool = Pool()
    disk = pool.create("disk", 8 << 30)
    before = pool.stats().metadata
    disk.zero(0, 4 << 30, no_hole=True)
    nodes = 2048 + 2 + 2
    assert nodes <= (pool.stats().metadata - before) // BLOCK <= nodes + 8


# The limit bounds everything.


def fill_to_the_limit(disk: Disk, make: Callable[[int], bytes], first: int = 0) -> int:
    """Write blocks until one is refused; the number behind the last that was stored."""
    number = first
    with contextlib.suppress(PoolFull):
        while True:
            disk.write(number * BLOCK, make(number))
            number += 1
    return number


def zeroes_that_are_no_holes(disk: Disk) -> None:
    disk.zero(0, 1 << 40, no_hole=True)


def a_block_in_every_table(disk: Disk) -> None:
    for number in range(1 << 20):
        disk.write(number << 31, b"\x07" * BLOCK)


def words_that_entries_cannot_hold(disk: Disk) -> None:
    for number in range(1 << 20):
        disk.write(number * BLOCK, (number | 1 << 62).to_bytes(8, "little") * 512)


def blocks_that_all_equal_a_few(disk: Disk) -> None:
    for number in range(1 << 20):
        disk.write(number * BLOCK, text(number % 50))


def blocks_that_all_differ(disk: Disk) -> None:
    for number in range(1 << 20):
        disk.write(number * BLOCK, text(number))


@pytest.mark.parametrize(
    "take",
    [
        zeroes_that_are_no_holes,
        a_block_in_every_table,
        words_that_entries_cannot_hold,
        blocks_that_all_equal_a_few,
        blocks_that_all_differ,
    ],
)
def test_whatever_a_client_writes_the_pool_stays_within_its_limit(take: Callable[[Disk], None]) -> None:
    """Tables, handles, the index and what counts holders are memory too."""
    pool = Pool(mem_limit=1 << 20, inline_dedup=True)
    disk = pool.create("disk", 1 << 51)
    resident = resident_bytes()
    with pytest.raises(PoolFull):
        take(disk)
    assert (1 << 20) - (64 << 10) - (16 << 10) <= pool.stats().memory_used <= 1 << 20
    assert resident_bytes() - resident <= (1 << 20) + (512 << 10)
    pool.check()
    disk.trim(0, 1 << 51)
    assert pool.stats().mem_used_total == 0
    disk.write(0, noise(1))
    pool.check()


def test_what_the_pool_says_it_uses_is_what_is_resident() -> None:
    def contents(disk: Disk) -> None:
        for number in range(16384):
            disk.write(number * BLOCK, (text, half_random, noise)[number % 3](number))

    warm = Pool()
    contents(warm.create("disk", SIZE))
    warm.close()
    del warm
    gc.collect()
    pool = Pool()
    before = resident_bytes()
    contents(disk := pool.create("disk", SIZE))
    used = pool.stats().memory_used
    assert used > 32 << 20
    assert resident_bytes() - before == pytest.approx(used, abs=1 << 20)
    for number in range(16384):
        if number % 7:
            disk.trim(number * BLOCK, BLOCK)
    run(Compact(pool))
    assert resident_bytes() - before == pytest.approx(pool.stats().memory_used, abs=1 << 20)
    disk.trim(0, SIZE)
    assert resident_bytes() - before == pytest.approx(pool.stats().memory_used, abs=1 << 20)
    assert pool.stats().memory_used < 1 << 20


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A directory in which a file takes what its pages take, and nothing for its own description."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_the_file_of_an_arena_has_the_pages_that_are_counted_and_no_other(tmpfs: Path) -> None:
    """Of metadata, what lies in the arena; the rest is beside it, at most eight bytes a block and some pages."""
    path = tmpfs / "pool"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 1 << 40)
        for number in range(4096):
            disk.write(number * 3 * BLOCK, (text, half_random, noise)[number % 3](number))
        clone = pool.clone(disk, "clone")
        clone.write(0, text(1) * 1024)
        beside = pool.stats().memory_used // BLOCK - file_pages(path)
        assert 8 <= beside <= 8 + 8 * 4096 // BLOCK + 8
        disk.trim(0, 1 << 39)
        assert pool.stats().memory_used // BLOCK - file_pages(path) == beside
        pool.delete(clone)
        assert beside - 4 <= pool.stats().memory_used // BLOCK - file_pages(path) <= beside  # heads of the index went
        assert pool.stats().mem_used_total == 0


def test_an_arena_grows_before_it_has_to(tmpfs: Path) -> None:
    """Whoever found no room under the pool's lock would map some there, and everybody would wait for the system."""
    ahead, slack = 8 << 20, 2 << 20
    file = tmpfs / "arena"
    with Pool(path=str(file)) as pool:
        disk = pool.create("disk", 1 << 30)
        for number in range(0, 40 << 8, 8):
            disk.write(number * BLOCK, b"".join(noise(number + index) for index in range(8)))
            found = file.stat()
            assert found.st_size - found.st_blocks * 512 >= ahead - slack


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
def test_nothing_that_a_pool_keeps_comes_in_huge_pages() -> None:
    """The first touch of one takes half a millisecond under whatever lock, and 2 MiB that nobody counts."""
    with Pool() as pool:
        pool.create("disk", 1 << 30).write(0, text(1))
        mappings = re.findall(
            r"^[0-9a-f]+-[0-9a-f]+ (\S+)(?:.*\n)*?VmFlags: (.*)$", Path("/proc/self/smaps").read_text(), re.MULTILINE
        )
        flags = [set(words.split()) for mode, words in mappings if mode.startswith("rw")]
        ours = [each for each in flags if "dd" in each]  # left out of a core dump, as pools are
        assert len(ours) > 5
        assert all("nh" in each for each in ours)


# Room is made before a write is refused.


@pytest.mark.parametrize("make", [noise, lambda number: half_random(number, 900)])
def test_a_write_compacts_before_it_is_refused(make: Callable[[int], bytes]) -> None:
    """A pool that is full of gaps: three of four blocks were discarded, and their zspages have a few left each."""
    pool = Pool(mem_limit=4 << 20)
    disk = pool.create("disk", SIZE)
    end = fill_to_the_limit(disk, half_random)
    assert end > 1200
    for number in range(end):
        if number % 4:
            disk.trim(number * BLOCK, BLOCK)
    kept = pool.stats()
    free = kept.mem_used_total - kept.compr_data_size
    assert free > 2 << 20
    refused = kept.failed_writes
    stored = fill_to_the_limit(disk, make, first=end) - end
    grown = pool.stats().compr_data_size - kept.compr_data_size
    assert stored
    assert grown > 0.9 * free - (128 << 10)
    assert pool.stats().memory_used <= pool.mem_limit
    assert pool.stats().failed_writes == refused + 1
    assert all(disk.read(number * BLOCK, BLOCK) == half_random(number) for number in range(0, end, 4))
    assert all(disk.read(number * BLOCK, BLOCK) == make(number) for number in range(end, end + stored))
    pool.check()


@pytest.mark.parametrize(("words", "limits"), [(0, range(400, 700)), (128, range(120, 250))], ids=["beside", "alone"])
def test_a_write_that_lacks_one_page_of_two_is_refused_and_does_not_try_for_ever(words: int, limits: range) -> None:
    """A block that does not compress needs a page and, each 256th, one for its cell: at some limits one is left.

    Below 256 pages a thread has no handle at hand (NEAR_PAGES, engine/ledger.pxd), which would do for that block; words
    that entries cannot hold take a handle each and no page, so that the 256th comes below that limit.
    """
    for pages in limits:
        pool = Pool(mem_limit=pages * BLOCK)
        disk = pool.create("disk", SIZE)
        for number in range(words):
            disk.write(number * BLOCK, (number | 1 << 62).to_bytes(8, "little") * 512)
        end = fill_to_the_limit(disk, noise, first=words)
        assert pages - 64 <= end - words <= pages
        assert pool.stats().failed_writes == 1


@pytest.mark.parametrize(("freed", "stored"), [(63, 0), (64, 1)])
def test_behind_a_pass_that_came_to_nothing_a_write_begins_another_once_enough_went(freed: int, stored: int) -> None:
    """Whatever that would gain: a full pool is not searched for each write that it refuses."""
    pool = Pool()
    disk = pool.create("disk", SIZE)
    disk.write(0, b"".join(half_random(number, 900) for number in range(800)))
    while run(Compact(pool)).objects_moved:
        pass
    for number in range(0, 8 * freed, 8):
        disk.trim(number * BLOCK, BLOCK)
    pool.mem_limit = pool.stats().memory_used
    assert fill_to_the_limit(disk, noise, first=800) - 800 >= stored
    assert (pool.stats().objects_moved > 0) == (stored > 0)
    pool.check()


def test_compaction_works_in_a_pool_that_is_exactly_full() -> None:
    """Also where what is left of a class has to move into a zspage that is still to be made."""
    pool = Pool(mem_limit=2 << 20)
    disk = pool.create("disk", SIZE)
    end = fill_to_the_limit(disk, lambda number: half_random(number, 200 + number % 14 * 240))
    for number in range(end):
        if number % 9:
            disk.trim(number * BLOCK, BLOCK)
    pool.mem_limit = pool.stats().memory_used
    report = run(Compact(pool))
    assert report.pages_returned * BLOCK > pool.mem_limit // 4
    while run(Compact(pool)).objects_moved:  # now there is room for the rest of each class
        pass
    assert pool.stats().mem_used_total <= pool.stats().compr_data_size * 1.03 + 15 * BLOCK
    pool.check()


def test_a_write_into_a_pool_without_gaps_is_refused_without_a_search() -> None:
    pool = Pool(mem_limit=2 << 20)
    disk = pool.create("disk", SIZE)
    fill_to_the_limit(disk, half_random)
    for number in range(100):
        with pytest.raises(PoolFull):
            disk.write((8000 + number) * BLOCK, noise(number))
    assert pool.stats().objects_moved == 0
    assert pool.stats().failed_writes == 101


def test_trimming_and_deleting_need_no_room() -> None:
    """In a full pool, and where a clone shares the tables that they change."""
    pool = Pool(mem_limit=2 << 20)
    disk = pool.create("disk", SIZE)
    end = fill_to_the_limit(disk, half_random)
    clone = pool.clone(disk, "clone")
    for number in range(0, end, 3):
        disk.trim(number * BLOCK, BLOCK)
        clone.trim(number * BLOCK, BLOCK)
        assert pool.stats().memory_used <= pool.mem_limit
    assert pool.stats().objects == end - (end + 2) // 3
    assert clone.read(BLOCK, BLOCK) == disk.read(BLOCK, BLOCK) == half_random(1)
    pool.delete(clone)
    pool.delete(disk)
    assert pool.stats().mem_used_total == 0
    pool.check()


def test_a_trim_that_finds_no_room_for_a_table_keeps_the_block_and_says_nothing() -> None:
    """TRIM is a wish; writing zeroes is not."""
    pool = Pool()
    disk = pool.create("disk", 1 << 40)
    for number in range(64):
        disk.write(number << 31, noise(number))
    pool.clone(disk, "clone")
    disk.write(63 << 31, noise(99))  # in tables of its own
    pool.mem_limit = pool.stats().memory_used
    disk.trim(0, (64 << 31) - BLOCK)
    assert pool.stats().memory_used <= pool.mem_limit
    assert disk.read(62 << 31, BLOCK) == noise(62)
    assert disk.read(63 << 31, BLOCK) == bytes(BLOCK)
    pool.mem_limit = pool.stats().memory_used
    with pytest.raises(PoolFull):
        disk.zero(0, (64 << 31) - 8192)
    pool.check()


# Addresses.


def test_a_thousand_pools_fit_a_process() -> None:
    """Each reserved 16 times what the machine could hold; 165 pools were the end, on a large machine 7."""
    code = """
from nbdzram.engine.pool import Pool
pools = [Pool(mem_limit=1 << 30) for _ in range(1000)] + [Pool() for _ in range(100)]
pools[-1].create("disk", 1 << 30).write(0, b"x" * 4096)
print(len(pools))
"""
    assert run_python(code).stdout == "1100\n"


@pytest.mark.parametrize("there", [True, False])
def test_without_addresses_an_error_says_how_many_there_are_and_what_reserves_fewer(
    tmp_path: Path, *, there: bool
) -> None:
    """And a file in which something is stored stays, where one that was to begin goes."""
    path = tmp_path / "arena"
    if there:
        with Pool(path=str(path)) as pool:
            pool.create("disk", SIZE)
    code = f"""
import resource
from nbdzram.engine.pool import Pool
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    Pool(path={str(path)!r})
except Exception as error:
    print(error)
"""
    told = run_python(code).stdout
    assert re.match(r"cannot reserve \d+ GiB of addresses for a pool: .*8192 MiB \(ulimit -v\)", told), told
    assert "a smaller mem_limit reserve less" in told
    assert path.exists() is there


def test_a_limit_that_the_reserved_addresses_cannot_hold_is_refused() -> None:
    pool = Pool(mem_limit=1 << 30)
    pool.mem_limit = 8 << 30
    with pytest.raises(UserError, match=r"mem_limit 8589934593 is over 8589934592 bytes: .* restart the server"):
        pool.mem_limit = (8 << 30) + 1
    assert pool.mem_limit == 8 << 30


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
