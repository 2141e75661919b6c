"""What happens to a table while one of its leaves is copied or made, which takes more than one hold of the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError
from tests.model.test_threads import number_of, numbered
from tests.support.lingering import lingering
from tests.unit.engine.blocks import BLOCK, run

LEAF = 512 * BLOCK

pytestmark = pytest.mark.usefixtures("small_requests_meet_too")


@pytest.mark.parametrize("there", [0, 512], ids=["made", "copied"])
def test_a_check_waits_for_a_leaf_that_is_on_its_way(there: int) -> None:
    """Nobody names it yet, and it is a node: judged now, it would be one too many."""
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    disk.write(0, numbered(1) * there)
    twin = pool.clone(disk, "twin")
    check = Check(pool, contents=False)

    def look() -> None:
        for _ in range(100):
            assert check.step(1 << 16)  # as it waits, it never ends

    lingering(pool, "own_leaf", lambda: twin.write(0, numbered(2)), look)
    run(check)
    pool.check()


@pytest.mark.parametrize("gone", ["its other holder", "its writer"])
def test_a_leaf_whose_holder_goes_as_it_is_copied_leaves_nothing(gone: str) -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    disk.write(0, b"".join(numbered(number + 1) for number in range(512)))
    twin = pool.clone(disk, "twin")

    def write() -> None:
        with contextlib.suppress(EngineError):  # of a disk that is deleted by then
            twin.write(0, numbered(1000))

    lingering(pool, "own_leaf", write, lambda: pool.delete(disk if gone == "its other holder" else twin))
    pool.check()
    (left,) = pool.disks()
    assert number_of(left.read(0, BLOCK)) == (1000 if gone == "its other holder" else 1)
    assert number_of(left.read(511 * BLOCK, BLOCK)) == 512
    pool.delete(left)
    assert pool.stats().objects == 0


def shrink(disk: Disk) -> None:
    disk.resize(LEAF)


def grow_again(disk: Disk) -> None:
    disk.resize(LEAF)
    disk.resize(32 << 20)


def clone(disk: Disk) -> None:
    disk.pool.clone(disk, "twin")


def clear_the_rest(disk: Disk) -> None:
    """The branches above are empty then, and go."""
    disk.trim(0, LEAF)


@pytest.mark.parametrize("meanwhile", [shrink, grow_again, clone, clear_the_rest])
def test_a_first_leaf_is_named_in_the_table_that_there_is_by_then(meanwhile: Callable[[Disk], None]) -> None:
    pool = Pool()
    disk = pool.create("disk", 32 << 20)
    disk.write(0, numbered(1))

    def write() -> None:
        disk.write(LEAF, numbered(2) + numbered(3))

    if meanwhile is shrink:
        with pytest.raises(ValueError, match="past the end"):
            lingering(pool, "own_leaf", write, lambda: meanwhile(disk))
    else:
        lingering(pool, "own_leaf", write, lambda: meanwhile(disk))
        assert number_of(disk.read(LEAF, BLOCK)) == 2
        assert number_of(disk.read(LEAF + BLOCK, BLOCK)) == 3
        assert disk.read(LEAF + 2 * BLOCK, BLOCK) == bytes(BLOCK)
    assert number_of(disk.read(0, BLOCK)) == (meanwhile is not clear_the_rest)
    pool.check()
    if meanwhile is clone:
        twin = next(found for found in pool.disks() if found is not disk)
        assert twin.read(LEAF, LEAF) == bytes(LEAF)
        pool.delete(twin)
    pool.delete(disk)
    pool.check()
    assert pool.stats().objects == 0


def test_a_first_leaf_of_an_export_that_goes_meanwhile_is_given_back() -> None:
    pool = Pool()
    pool.create("other", 32 << 20).write(0, numbered(2))  # what tables need beside their nodes is there
    disk = pool.create("disk", 32 << 20)
    before = pool.stats().metadata

    def write() -> None:
        with contextlib.suppress(EngineError):
            disk.write(0, numbered(1))

    lingering(pool, "own_leaf", write, lambda: pool.delete(disk))
    pool.check()
    assert pool.stats().metadata == before
