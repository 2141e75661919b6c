"""The longest hold of a pool's lock and of a disk's stripe, in processor time: what a client may have to wait for.

Interrupts, and whoever shares the processor, count as the time of the thread that they stop: on a shared machine one of
two million holds that do nothing takes 100 to 200 us. So each case goes in small steps, which every round repeats
exactly: of a step, its quietest round is what the engine takes; of the case, its longest step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from nbdzram.engine.arena import fail_allocation
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import UserError
from tests.model.engine import Pair, random_step
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, text

Holds = dict[str, tuple[int, str]]
"""Of each kind of lock, the longest: nanoseconds, and where."""

ROUNDS = 5
MODEL_STEPS = 3000
BRANCH = 1 << 31  # what a branch of the lowest level covers
BRANCHES = 2000  # 4 TiB of export
BLOCKS = 60_000
LEFT = 52_000  # blocks behind these are left to be freed by a deletion, which is one step
STEP_BUDGET = 256  # of a run
STEP_BYTES = 4 << 20
NOTHINGS = 2_000_000


def of_the_model_run() -> Iterator[Pool]:
    """Every operation, in random order, beside runs that are stepped."""
    for seed in range(3):
        choose = random.Random(seed)
        pair = Pair(None, mem_limit=choose.choice((0, 600 << 10)), inline_dedup=seed % 2 == 1)
        pair.create()
        for _ in range(MODEL_STEPS):
            yield pair.pool
            try:
                random_step(pair, choose)
            except UserError:  # a failing allocation: no new export then
                fail_allocation(-1)
        fail_allocation(-1)
        yield pair.pool


def of_empty_branches() -> Iterator[Pool]:
    """A block in each 2 GiB, written, described, cloned, trimmed and deleted."""
    pool = Pool()
    disk = pool.create("disk", BRANCH * BRANCHES)
    for turn in range(2):
        for number in range(1, BRANCHES + 1):
            yield pool
            disk.write(number * BRANCH - BLOCK, text(number))
            if turn == 0:
                disk.trim(number * BRANCH - BLOCK, BLOCK)
    yield pool
    disk.extents(0, disk.size_bytes, 1 << 20)
    yield pool
    disk.usage()
    yield pool
    twin = pool.clone(disk, "twin")
    yield pool
    twin.trim(0, twin.size_bytes)
    yield pool
    disk.resize(BRANCH)
    yield pool
    pool.delete(disk)
    yield pool


def of_a_larger_pool() -> Iterator[Pool]:
    """Some hundred megabytes: what is looked at is in no cache, and what is freed comes in runs."""
    pool = Pool()
    disk = pool.create("disk", 1 << 32)
    kinds = (half_random, noise, prose, text)
    for block in range(0, BLOCKS, 8):
        content = b"".join(kinds[(block + n) // 3 % 4]((block + n) * 7 % (BLOCKS // 2)) for n in range(8))
        yield pool
        disk.write(block * BLOCK, content)
    yield pool
    twin = pool.clone(disk, "twin")
    for block in range(0, BLOCKS, 512):
        yield pool
        twin.write(block * BLOCK, noise(block))  # the copy of a whole leaf
    for task in (Fold(pool), Recompress(pool, dictionary=True), Compact(pool)):
        yield pool
        while task.step(STEP_BUDGET):
            yield pool
    for at in range(0, BLOCKS * BLOCK, STEP_BYTES):
        yield pool
        disk.extents(at, STEP_BYTES, STEP_BYTES // BLOCK)
    for one, end in ((disk, BLOCKS * BLOCK), (twin, LEFT * BLOCK)):
        for at in range(0, end, STEP_BYTES):
            yield pool
            one.trim(at, STEP_BYTES)
    yield pool
    disk.usage()
    compact = Compact(pool)
    while compact.step(STEP_BUDGET):
        yield pool
    yield pool
    pool.delete(twin)
    yield pool


CASES = {
    "the model run": of_the_model_run,
    "empty branches": of_empty_branches,
    "a larger pool": of_a_larger_pool,
}


def longest_of(case: Callable[[], Iterator[Pool]], rounds: int) -> Holds:
    """The longest hold of each kind, of each step in the round in which it was shortest."""
    found = [_steps_of(case) for _ in range(rounds)]
    quietest = [
        {kind: min(each[kind] for each in same) for kind in ("pool", "stripe")} for same in zip(*found, strict=True)
    ]
    return {kind: max(step[kind] for step in quietest) for kind in ("pool", "stripe")}


def _steps_of(case: Callable[[], Iterator[Pool]]) -> list[Holds]:
    """What each step of a case held longest; one that ends with another pool than it began with held nothing."""
    steps: list[Holds] = []
    for pool in case():
        steps.append(pool.longest_holds())
        pool.test_locks(watch=True)
    return steps


def of_nothing() -> int:
    """The longest of holds that do next to nothing: what the machine adds."""
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
    for name, measure in CASES.items():
        for kind, (longest_ns, function) in longest_of(measure, ROUNDS).items():
            print(f"{name}: {kind} {longest_ns / 1000:.1f} us in {where(function)}")
