"""Who asks what blocks are looks beside those who write: what is told of a block is how it was at one moment.

Most blocks here are as they are for good, and told so always, of sharing too; some change again and again, and are told
as they were in one of the turns that were under way. Of sharing nothing is told that is not within the export.
"""

from __future__ import annotations

import contextlib
import random

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import EngineError
from tests.model.test_readers import Told, beside, paused
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

LEAF_BLOCKS = 512
TURNS = 40
ALL = Extent(31)
FEW = [0, 1, 63, 64, 130, LEAF_BLOCKS, LEAF_BLOCKS + 77]
"""Blocks that change: neighbours, at both sides of where a look ends, and in the leaf that all others share one object
in."""
KINDS = (Extent.HOLE | Extent.ZERO, Extent.HUGE, Extent(0), Extent.SAME_FILLED, Extent.ZERO | Extent.SAME_FILLED)
"""What a block is told to be, turn by turn; never shared, as no other block of its export ever holds the same."""

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


def change(disk: Disk, block: int, turn: int) -> None:
    """Make the block what it is in that turn."""
    match turn % len(KINDS):
        case 0:
            disk.trim(block * BLOCK, BLOCK)
        case 1:
            disk.write(block * BLOCK, noise((block + 1) * 10000 + turn))
        case 2:
            disk.write(block * BLOCK, half_random((block + 1) * 10000 + turn))
        case 3:
            disk.write(block * BLOCK, bytes([turn % 200 + 1]) * BLOCK)
        case _:
            disk.zero(block * BLOCK, BLOCK, no_hole=True)


def told_of(disk: Disk, mask: Extent) -> list[Extent]:
    """What each block of the first two leaves is told to be."""
    told: list[Extent] = []
    for length, bits in disk.extents(0, 2 * LEAF_BLOCKS * BLOCK, 1 << 20, mask):
        told += [Extent(bits)] * (length // BLOCK)
    return told


def begin(pool: Pool) -> tuple[Disk, list[Extent]]:
    """An export of pairs and single blocks, and behind them of one object with as many holders as an entry counts and
    some; folded, and what each block is to be told."""
    disk = pool.create("disk", 64 * LEAF_BLOCKS * BLOCK)
    expected: list[Extent] = []
    for block in range(LEAF_BLOCKS):
        disk.write(block * BLOCK, (half_random if block % 5 else noise)(block // 3 * 3 if block % 3 < 2 else block))
        pair = block // 3 * 3
        is_pair = block % 3 < 2 and (pair % 5 == 0) == ((pair + 1) % 5 == 0)
        expected.append((Extent(0) if block % 5 else Extent.HUGE) | (Extent.SHARED if is_pair else Extent(0)))
    for block in range(LEAF_BLOCKS, 2 * LEAF_BLOCKS):
        disk.write(block * BLOCK, text(1))
        expected.append(Extent.SHARED)
    for block in FEW:
        disk.trim(block * BLOCK, BLOCK)
        expected[block] = Extent.HOLE | Extent.ZERO
        if block < LEAF_BLOCKS and block % 3 < 2:  # its pair is alone now
            other = block + 1 if block % 3 == 0 else block - 1
            expected[other] &= ~Extent.SHARED
    run(Fold(pool))
    return disk, expected


def allowed(block: int, expected: list[Extent], before: list[int], after: list[int]) -> set[Extent]:
    if block not in FEW:
        return {expected[block]}
    return {KINDS[turn % len(KINDS)] for turn in range(before[block], after[block] + 1)}


@pytest.mark.parametrize("tell_sharing", [False, True])
@pytest.mark.parametrize("inline_dedup", [False, True])
def test_what_is_told_of_a_block_is_how_it_was_at_one_moment(tell_sharing: bool, inline_dedup: bool) -> None:
    pool = paused(tell_sharing=tell_sharing, inline_dedup=inline_dedup)
    disk, expected = begin(pool)
    other = pool.create("other", LEAF_BLOCKS * BLOCK)
    told = Told(2 * LEAF_BLOCKS)
    number = 0

    def write() -> None:
        for turn in range(1, TURNS):
            for block in FEW:
                told.begun[block] = turn
                change(disk, block, turn)
                told.done[block] = turn

    def look(mask: Extent) -> None:
        before = list(told.done)
        found = told_of(disk, mask)
        after = list(told.begun)
        assert len(found) == 2 * LEAF_BLOCKS
        told_always = mask & ~Extent.SHARED if tell_sharing else mask  # others' clones and copies come and go
        for block, bits in enumerate(found):
            states = {state & told_always for state in allowed(block, expected, before, after)}
            assert bits & told_always in states, f"block {block} is told to be {bits!r}, of {states}"

    def share() -> None:
        """What the export shares has holders elsewhere too, from which to which they are more than a cell counts."""
        for block in random.sample(range(LEAF_BLOCKS), 60):
            other.write(block * BLOCK, text(1) if block % 2 else disk.read(block * BLOCK, BLOCK))
        other.trim(0, LEAF_BLOCKS * BLOCK)

    def clone() -> None:
        nonlocal number
        number += 1
        twin = pool.clone(disk, f"twin {number}")
        first = told_of(twin, ALL)
        twin.write(5 * BLOCK, noise(5))
        found = told_of(twin, ALL)
        assert tell_sharing or found[6:] == first[6:]
        pool.delete(twin)

    def resize() -> None:
        disk.write(60 * LEAF_BLOCKS * BLOCK, text(2))
        disk.resize(32 * LEAF_BLOCKS * BLOCK)
        disk.resize(64 * LEAF_BLOCKS * BLOCK)
        assert disk.extents(32 * LEAF_BLOCKS * BLOCK, 32 * LEAF_BLOCKS * BLOCK, 2) == [
            (32 * LEAF_BLOCKS * BLOCK, Extent.HOLE | Extent.ZERO)
        ]

    def keep_house() -> None:
        run(Fold(pool), 40)
        run(Compact(pool), 40)
        run(Recompress(pool), 40)
        run(Check(pool), 40)

    beside(
        write, lambda: look(ALL), lambda: look(ALL), lambda: look(Extent.HOLE | Extent.ZERO),
        share, clone, resize, keep_house,
    )  # fmt: skip
    pool.check()


def test_an_export_that_is_deleted_is_told_as_it_was_or_not_at_all() -> None:
    """Never as holes, though its entries become that one by one."""
    pool = paused()
    kept, _ = begin(pool)
    disks: list[Disk] = []

    def come_and_go() -> None:
        for turn in range(TURNS):
            disks[:] = [pool.clone(kept, f"twin {turn}")]
            disks[0].write(2 * BLOCK, noise(turn))  # a leaf of its own, which goes with it
            pool.delete(disks[0])

    def look(mask: Extent) -> None:
        for disk in disks[:1]:
            with contextlib.suppress(EngineError):
                found = told_of(disk, mask)
                assert found[3:] == [bits & mask for bits in expected][3:]

    expected = told_of(kept, ALL)
    beside(come_and_go, *([lambda: look(ALL)] * 2), lambda: look(Extent.HOLE))
    pool.check()
