"""The longest hold of a pool's lock and of a disk's stripe, in processor time: what a client may have to wait for."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from nbdzram.engine.arena import fail_allocation
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import UserError
from tests.model.engine import Pair, random_step
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

ROUNDS = 5
MODEL_STEPS = 3000
BRANCH = 1 << 31  # what a branch of the lowest level covers
BRANCHES = 2000  # 4 TiB of export
BLOCKS = 60_000
NOTHINGS = 2_000_000


def of_the_model_run(seed: int) -> dict[str, tuple[int, str]]:
    """Every operation, in random order, beside runs that are stepped."""
    choose = random.Random(seed)
    pair = Pair(None, mem_limit=choose.choice((0, 600 << 10)), inline_dedup=seed % 2 == 1)
    pair.pool.test_locks(watch=True)
    pair.create()
    for step in range(MODEL_STEPS):
        try:
            random_step(pair, choose)
        except UserError:  # a failing allocation: no new export then
            fail_allocation(-1)
        if step % 100 == 0:
            pair.check()
    fail_allocation(-1)
    return pair.pool.longest_holds()


def of_empty_branches() -> dict[str, tuple[int, str]]:
    """A block in each 2 GiB, written, described, cloned, trimmed and deleted."""
    pool = Pool()
    pool.test_locks(watch=True)
    disk = pool.create("disk", BRANCH * BRANCHES)
    for turn in range(2):
        for number in range(1, BRANCHES + 1):
            disk.write(number * BRANCH - BLOCK, text(number))
            if turn == 0:
                disk.trim(number * BRANCH - BLOCK, BLOCK)
    disk.extents(0, disk.size_bytes, 1 << 20)
    disk.usage()
    twin = pool.clone(disk, "twin")
    pool.check()
    twin.trim(0, twin.size_bytes)
    disk.resize(BRANCH)
    pool.delete(disk)
    return pool.longest_holds()


def of_a_larger_pool() -> dict[str, tuple[int, str]]:
    """Some hundred megabytes: what is looked at is in no cache, and what is freed comes in runs."""
    pool = Pool()
    pool.test_locks(watch=True)
    disk = pool.create("disk", 1 << 32)
    kinds = (half_random, noise, prose, text)
    for block in range(0, BLOCKS, 8):
        content = b"".join(kinds[(block + n) // 3 % 4]((block + n) * 7 % (BLOCKS // 2)) for n in range(8))
        disk.write(block * BLOCK, content)
    twin = pool.clone(disk, "twin")
    for block in range(0, BLOCKS, 512):
        twin.write(block * BLOCK, noise(block))  # the copy of a whole leaf
    for task in (Fold(pool), Recompress(pool, dictionary=True), Compact(pool)):
        run(task, 4096)
    pool.check()
    disk.extents(0, disk.size_bytes, 1 << 20)
    disk.usage()
    disk.trim(0, disk.size_bytes)
    run(Compact(pool), 4096)
    pool.delete(twin)
    return pool.longest_holds()


CASES = {
    "the model run": lambda: max_of(*(of_the_model_run(seed) for seed in range(3))),
    "empty branches": of_empty_branches,
    "a larger pool": of_a_larger_pool,
}


def of_the_quietest_round(measure: Callable[[], dict[str, tuple[int, str]]], rounds: int) -> dict[str, tuple[int, str]]:
    """The longest hold of each kind, of the round in which it was shortest.

    Every round does the same, so that its longest hold is at least what the engine takes; the rest is the machine's:
    interrupts and whoever shares the processor count as the thread's time.
    """
    found = [measure() for _ in range(rounds)]
    return {kind: min(each[kind] for each in found) for kind in found[0]}


def max_of(*holds: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    return {kind: max(each[kind] for each in holds) for kind in holds[0]}


def of_nothing() -> int:
    """The longest of holds that do next to nothing: what the machine adds, by interrupts and by who shares it."""
    pool = Pool()
    pool.test_locks(watch=True)
    for _ in range(NOTHINGS):
        pool.reset_mem_used_max()
    return pool.longest_holds()["pool"][0]


def where(function: str) -> str:
    """As the source has it: __pyx_f_7nbdzram_6engine_4disk_4Disk__commit is Disk._commit."""
    return re.sub(r"^.*_\d+([A-Z]\w*?)_(_?[a-z]\w*)$", r"\1.\2", function)


if __name__ == "__main__":
    print(f"a hold that does nothing: {min(of_nothing() for _ in range(ROUNDS)) / 1000:.1f} us")
    for case, measure in CASES.items():
        for kind, (longest_ns, function) in of_the_quietest_round(measure, ROUNDS).items():
            print(f"{case}: {kind} {longest_ns / 1000:.1f} us in {where(function)}")
