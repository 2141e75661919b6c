"""One story that leaves an arena with every kind of content, and what its exports hold afterwards.

It uses what every version of the engine has: the arenas beside this file, format-1.arena.xz and format-2.arena.xz, are
what the last program of format 1, and one of format 2, made of it (`python -m tests.faults.contents FILE` there).
"""

from __future__ import annotations

import random
import sys

from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import Report
from nbdzram.engine.run import Run

BLOCK = 4096
NEAR = 700  # blocks: two leaves
FAR = 1 << 28  # block number, 1 TiB: under other branches than the first ones
SIZE = (FAR + 100) * BLOCK
WORDS = ["".join(random.Random(number).choices("etaoinshrdlu", k=3 + number % 7)) for number in range(60)]


def sparse(number: int) -> bytes:
    """A block of few words, repeated: a dictionary makes it much shorter."""
    choose = random.Random(number)
    return (b" ".join(choose.choice(WORDS).encode() for _ in range(40)) * 20)[:BLOCK]


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK)


def mixed(number: int) -> bytes:
    """Half of it does not compress."""
    return random.Random(number).randbytes(300) + bytes(BLOCK - 300)


def repeated(number: int) -> bytes:
    """One word: a byte, a small number, four bytes, or eight that look like nothing."""
    choose = random.Random(number)
    word = (
        choose.randbytes(1) * 8,
        choose.randrange(1, 1 << 40).to_bytes(8, "little"),
        choose.randbytes(4) * 2,
        choose.randbytes(8),
    )[number % 4]
    return word * (BLOCK // 8)


class Told:
    """What is written to disks, told to both sides."""

    def __init__(self) -> None:
        self.exports: dict[str, dict[int, bytes]] = {}

    def write(self, disk: Disk, block: int, content: bytes) -> None:
        disk.write(block * BLOCK, content)
        self.exports[disk.name][block] = content


def run(task: Run[Report]) -> None:
    while task.step(1000):
        pass


def tell(pool: Pool) -> dict[str, dict[int, bytes]]:
    """Fill a pool. By export, its blocks that are no holes."""
    told = Told()
    names = ("plain", "to be removed", "twin", "empty")
    plain, removed, twin, _ = (pool.create(name, SIZE) for name in names)
    told.exports = {name: {} for name in names}
    for number in range(300):
        told.write(plain, number, sparse(number))
    for number in range(20):
        told.write(removed, number, noise(900 + number))
    run(Recompress(pool, level=3))
    for number in range(100, 300):
        told.write(plain, 200 + number, sparse(1000 + number))
    run(Recompress(pool, level=9, dictionary=True))
    for number in range(24):
        told.write(plain, 520 + number, noise(number % 8))
        told.write(plain, 560 + number, repeated(number))
        told.write(plain, FAR + number, mixed(number % 15))
        told.write(twin, 2 * number, sparse(number))
    for number in range(30):
        told.write(plain, FAR + 40 + number, sparse(2000 + number))
    run(Recompress(pool, level=2))
    for number in range(20):
        told.write(plain, 600 + number, sparse(3000 + number))
    run(Fold(pool))
    copy = pool.clone(plain, "copy")
    told.exports["copy"] = dict(told.exports["plain"])
    for number in range(10):
        told.write(copy, 5 * number, mixed(50 + number))
        told.write(copy, 630 + number, repeated(50 + number))
    plain.trim(50 * BLOCK, 20 * BLOCK)
    for number in range(50, 70):
        del told.exports["plain"][number]
    pool.delete(removed)
    del told.exports["to be removed"]
    run(Compact(pool))
    return told.exports


def expected() -> dict[str, dict[int, bytes]]:
    """What `tell` leaves, from a pool that nobody damages."""
    with Pool() as pool:
        return tell(pool)


if __name__ == "__main__":
    with Pool(path=sys.argv[1]) as told_pool:
        tell(told_pool)
        told_pool.check()
        print(told_pool.stats())
