"""What an export may store of its pool: its own blocks count, each whole, whoever else has them."""

from __future__ import annotations

import pytest

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import PoolFull
from tests.unit.engine.blocks import BLOCK, noise, text

SIZE = 64 << 20
LONG_WORD = bytes.fromhex("0123456789abcdef")  # too long for an entry of the table


def made(quota_blocks: int, *, pool: Pool | None = None, name: str = "disk") -> Disk:
    disk = (pool or Pool()).create(name, SIZE)
    disk.quota_bytes = quota_blocks * BLOCK
    return disk


def stored(disk: Disk) -> int:
    return disk.stats().stored // BLOCK


def fill(disk: Disk, blocks: int, *, first: int = 0) -> None:
    for block in range(first, first + blocks):
        disk.write(block * BLOCK, text(block))


def test_blocks_are_stored_up_to_the_quota_and_not_one_more() -> None:
    disk = made(3)
    fill(disk, 3)
    with pytest.raises(PoolFull, match=r"may store 12288 bytes; trim, or raise its quota"):
        disk.write(3 * BLOCK, text(3))
    assert (stored(disk), disk.read(3 * BLOCK, BLOCK)) == (3, bytes(BLOCK))
    assert disk.read(0, 3 * BLOCK) == text(0) + text(1) + text(2)
    disk.pool.check()


def test_a_long_write_is_stored_as_far_as_the_quota_goes() -> None:
    """As in a full pool: each block has its old or its new content."""
    disk = made(40)
    with pytest.raises(PoolFull):
        disk.write(0, b"".join(text(block) for block in range(64)))
    assert stored(disk) == 40
    assert disk.read(39 * BLOCK, 2 * BLOCK) == text(39) + bytes(BLOCK)


def test_at_the_quota_blocks_are_written_again_whole_and_in_part() -> None:
    disk = made(2)
    fill(disk, 2)
    disk.write(0, noise(1))
    disk.write(BLOCK + 100, b"part")
    assert disk.read(0, BLOCK) == noise(1)
    assert disk.read(BLOCK + 100, 4) == b"part"
    with pytest.raises(PoolFull):
        disk.write(5 * BLOCK + 100, b"part")
    assert stored(disk) == 2


def test_what_is_trimmed_or_zeroed_is_given_back() -> None:
    disk = made(2)
    fill(disk, 2)
    disk.trim(0, BLOCK)
    disk.write(7 * BLOCK, text(7))
    disk.zero(BLOCK, BLOCK)
    disk.write(8 * BLOCK, text(8))
    assert stored(disk) == 2


def test_blocks_of_one_repeated_word_count_and_zeroes_as_holes_do_not() -> None:
    """What is told as data by BLOCK_STATUS is what counts, so that a client can count it itself."""
    disk = made(2)
    disk.write(0, b"\xff" * BLOCK)
    disk.zero(BLOCK, BLOCK, no_hole=True)
    with pytest.raises(PoolFull):
        disk.zero(2 * BLOCK, BLOCK, no_hole=True)
    disk.zero(3 * BLOCK, 100 * BLOCK)
    assert stored(disk) == 2


def test_a_repeated_word_that_needs_an_object_counts_as_one_block() -> None:
    """It is put by whoever has the lock alone, after it was tried beside others."""
    disk = made(3)
    disk.write(0, text(0))
    for block in (1, 2):
        disk.write(block * BLOCK, LONG_WORD * (BLOCK // len(LONG_WORD)))
    assert stored(disk) == 3
    disk.trim(0, 3 * BLOCK)
    assert stored(disk) == 0
    disk.pool.check()


@pytest.mark.parametrize("inline", [False, True])
def test_a_block_counts_whoever_else_has_it(inline: bool) -> None:
    """So nobody learns from a quota what others store; and compressing well gains nothing."""
    pool = Pool(inline_dedup=inline)
    other, disk = made(0, pool=pool, name="other"), made(4, pool=pool)
    fill(other, 8)
    fill(disk, 4)
    with pytest.raises(PoolFull):
        disk.write(4 * BLOCK, text(4))
    disk.write(0, text(1))
    assert stored(disk) == 4


def test_a_quota_is_one_export_s_alone() -> None:
    pool = Pool()
    small, large = made(1, pool=pool, name="small"), made(0, pool=pool, name="large")
    fill(small, 1)
    with pytest.raises(PoolFull):
        fill(small, 1, first=1)
    fill(large, 100)
    assert pool.stats().failed_writes == 0, "the pool had room"


def test_below_what_is_stored_nothing_is_lost_and_nothing_is_added() -> None:
    disk = made(0)
    fill(disk, 10)
    disk.quota_bytes = 4 * BLOCK
    assert disk.read(9 * BLOCK, BLOCK) == text(9)
    disk.write(9 * BLOCK, noise(9))
    for trimmed in range(6):
        with pytest.raises(PoolFull):
            disk.write(20 * BLOCK, text(20))
        disk.trim(trimmed * BLOCK, BLOCK)
    disk.trim(6 * BLOCK, BLOCK)
    disk.write(20 * BLOCK, text(20))
    assert stored(disk) == 4


def test_a_clone_counts_what_it_shares_as_its_own() -> None:
    pool = Pool()
    origin = made(0, pool=pool)
    fill(origin, 4)
    clone = pool.clone(origin, "clone")
    clone.quota_bytes = 4 * BLOCK
    clone.write(0, noise(0))
    with pytest.raises(PoolFull):
        clone.write(4 * BLOCK, text(4))
    assert (stored(clone), stored(origin)) == (4, 4)


def test_a_quota_is_in_whole_blocks_and_no_smaller_than_was_asked_for() -> None:
    disk = made(0)
    disk.quota_bytes = BLOCK + 1
    assert disk.quota_bytes == 2 * BLOCK
