"""What a pool's blocks cost: pages are taken late and given back early, and every count of them is what is resident."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nbdzram.engine.fold import Compact
from nbdzram.engine.pool import Pool
from nbdzram.errors import PoolFull
from tests.unit.engine.blocks import BLOCK, half_random, noise, run

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
        before = file_pages(path)
        spare = pool.stats().mem_used_total // BLOCK - 32
    with Pool(path=str(path)) as pool:
        assert pool.stats().mem_used_total == 32 * BLOCK
        assert before - file_pages(path) == spare
        (disk,) = pool.disks()
        for number in range(256):
            assert disk.read(number * BLOCK, BLOCK) == (noise(number) if number % 16 in (3, 9) else bytes(BLOCK))
        for number in range(256):
            disk.write(number * BLOCK, noise(number + 1000))
        assert pool.stats().mem_used_total == 256 * BLOCK
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
    assert run(Compact(pool)) == {"objects_moved": 0, "pages_returned": 0}
    assert run(Compact(pool, dry_run=True))["pages_returned"] == 0
