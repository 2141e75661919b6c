"""Trims of whole leaves, and of parts, meet writers, clones, deletions, runs, and readers without a lock.

Each block counts: a write gives it a number that is higher than all before. So who reads knows what may be there: a
number that was written since the last trim that was over, or a hole if there was a trim since the last write.
"""

from __future__ import annotations

import random
from functools import partial

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Extent
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import pause_at_publish
from nbdzram.engine.recompress import Recompress
from tests.model.test_writers import meanwhile
from tests.support.threads import in_threads
from tests.unit.engine.blocks import BLOCK, half_random, noise, run

LEAF_BLOCKS = 512
LEAF = LEAF_BLOCKS * BLOCK
BUSY = [0, 1, 31, 32, 33, 300, LEAF_BLOCKS - 1, LEAF_BLOCKS, LEAF_BLOCKS + 1]
"""At both ends of a leaf, and of what a trim clears at once; the second leaf has two of them."""
WRITERS, WRITES = 4, 150

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def numbered(block: int, number: int) -> bytes:
    """Some equal ones among them, of which a fold makes one object."""
    body = noise(number % 5) if number % 3 else half_random(number % 7)
    return number.to_bytes(8, "little") + block.to_bytes(8, "little") + body[16:]


def number_of(block: int, content: bytes) -> int:
    number = int.from_bytes(content[:8], "little")
    assert content == (numbered(block, number) if number else bytes(BLOCK)), f"block {block} is a mixture"
    return number


class Blocks:
    """Two leaves of an export, and what may be there."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.disk = pool.create("disk", 2 * LEAF)
        self.begun = dict.fromkeys(BUSY, 0)  # by block: the last number whose write began
        self.written = dict.fromkeys(BUSY, (0, 0))  # the last whose write ended, and how many trims had when it began
        self.gone = dict.fromkeys(BUSY, 0)  # up to which nothing is there any more
        self.trims_begun = dict.fromkeys(BUSY, 0)
        self.trims_ended = dict.fromkeys(BUSY, 0)
        self.twins = 0

    def write(self, seed: int) -> None:
        choose = random.Random(seed)
        mine = BUSY[seed::WRITERS]
        for _ in range(WRITES):
            block = choose.choice(mine)
            trims = self.trims_ended[block]
            self.begun[block] += 1
            self.disk.write(block * BLOCK, numbered(block, self.begun[block]))
            self.written[block] = self.begun[block], trims

    def trim(self, choose: random.Random) -> None:
        first = choose.choice([0, 0, 0, 1, 31, 300])
        end = choose.choice([301, LEAF_BLOCKS, LEAF_BLOCKS, LEAF_BLOCKS + 1, 2 * LEAF_BLOCKS])
        inside = [block for block in BUSY if first <= block < end]
        before = {block: self.written[block][0] for block in inside}
        for block in inside:
            self.trims_begun[block] += 1
        self.disk.trim(first * BLOCK, (end - first) * BLOCK)
        for block in inside:
            self.gone[block] = before[block]
            self.trims_ended[block] += 1

    def look(self) -> None:
        for block in BUSY:
            gone, (last, trims) = self.gone[block], self.written[block]
            number = number_of(block, self.disk.read(block * BLOCK, BLOCK))
            if number:
                assert max(gone + 1, last) <= number <= self.begun[block], f"block {block}: {number} after {last}"
            else:
                assert last == 0 or self.trims_begun[block] > trims, f"block {block}: nobody took {last}"

    def clone(self, choose: random.Random) -> None:
        self.twins += 1
        twin = self.pool.clone(self.disk, f"twin {self.twins}")
        first = twin.read(0, 2 * LEAF)
        if choose.random() < 0.5:
            twin.trim(0, LEAF)
            assert twin.read(0, 2 * LEAF) == bytes(LEAF) + first[LEAF:]
            assert twin.extents(0, LEAF, 9) == [(LEAF, Extent.HOLE | Extent.ZERO)]
        else:
            assert twin.read(0, 2 * LEAF) == first
        self.pool.delete(twin)


@pytest.mark.parametrize("pausing", ["at locks", "at publications"])
def test_a_trim_takes_what_was_there_and_nothing_that_came_later(pausing: str) -> None:
    pool = Pool()
    blocks = Blocks(pool)
    pool.test_locks(pause=pausing == "at locks")
    pause_at_publish(pausing == "at publications")

    def keep_house() -> None:
        run(Fold(pool), 20)
        run(Compact(pool), 20)
        run(Recompress(pool), 20)
        run(Check(pool), 200)

    meanwhile(
        partial(blocks.trim, random.Random(1)), blocks.look, blocks.look, partial(blocks.clone, random.Random(2)),
        keep_house, pool.stats,
    )(lambda: in_threads(*(partial(blocks.write, seed) for seed in range(WRITERS))))  # fmt: skip
    blocks.look()
    pool.check()
    disk = blocks.disk
    told = sum(length for length, bits in disk.extents(0, 2 * LEAF, 1 << 20) if not bits & Extent.HOLE)
    assert disk.stats().stored == told
    disk.trim(0, 2 * LEAF)
    stats = pool.stats()
    assert (stats.objects, stats.handles, stats.mem_used_total, stats.orig_data_size) == (0, 0, 0, 0)
