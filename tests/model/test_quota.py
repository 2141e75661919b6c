"""Writers beside each other stay within their export's quota, to the block."""

from __future__ import annotations

import contextlib

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import PoolFull
from tests.support.threads import in_threads
from tests.unit.engine.blocks import BLOCK, noise, text

SIZE = 64 << 20
LEAF_BLOCKS = 512

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def test_no_block_more_is_stored_and_none_less() -> None:
    """Eight threads want 4,000 blocks where 1,111 may be."""
    threads, each, quota = 8, 500, 1111
    disk = Pool().create("disk", SIZE)
    disk.quota_bytes = quota * BLOCK
    for thread in range(threads):
        disk.write(thread * LEAF_BLOCKS * BLOCK, noise(thread))  # so that the leaves are there, and writers go beside
    refused = [0] * threads

    def write(thread: int) -> None:
        for block in range(1, each + 1):
            try:
                disk.write((thread * LEAF_BLOCKS + block) * BLOCK, text(thread * LEAF_BLOCKS + block))
            except PoolFull:
                refused[thread] += 1

    in_threads(*(lambda thread=thread: write(thread) for thread in range(threads)))
    assert disk.stats().stored == quota * BLOCK
    assert sum(refused) == threads * each - (quota - threads)
    disk.pool.check()


def test_writing_and_trimming_loses_no_block_of_the_quota() -> None:
    threads, rounds, quota = 4, 300, 10
    disk = Pool().create("disk", SIZE)
    disk.quota_bytes = quota * BLOCK

    def write_and_trim(thread: int) -> None:
        first = thread * LEAF_BLOCKS * BLOCK
        for _ in range(rounds):
            with contextlib.suppress(PoolFull):
                disk.write(first + BLOCK, text(thread) * 4)
            disk.trim(first, LEAF_BLOCKS * BLOCK)

    in_threads(*(lambda thread=thread: write_and_trim(thread) for thread in range(threads)))
    assert disk.stats().stored == 0
    for block in range(quota):
        disk.write(block * BLOCK, text(block))
    with pytest.raises(PoolFull):
        disk.write(quota * BLOCK, text(quota))
    disk.pool.check()
