"""A process to be killed: writes to a pool in a file and tells, in shared memory, what it has done.

Run as: python -m tests.faults.writer ARENA LEDGER SEED. The ledger holds, for each block, two 32-bit numbers: the
version that a write began, and the version that it finished. Everything that a block can hold follows from its number
and its version (content), so whoever reads the arena knows what to expect.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys
import threading

from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool

BLOCK = 4096
BLOCKS = 512
LEDGER_SIZE = 8 * BLOCKS


def content(block: int, version: int) -> bytes:
    """What version `version` of a block holds; version 0 is never written. Many versions are equal to other blocks'."""
    if version == 0 or version % 7 == 3:
        return bytes(BLOCK)
    kind = random.Random(version % 11)
    if version % 5 == 0:
        return random.Random(block * 1000003 + version).randbytes(BLOCK)
    if version % 5 == 1:
        return kind.randbytes(8) * 512
    return kind.randbytes(500 + 137 * (version % 13)).ljust(BLOCK, b"\0")


def main() -> None:
    arena, ledger_path, seed = sys.argv[1:]
    choose = random.Random(int(seed))
    with open(ledger_path, "r+b") as file:  # noqa: PTH123 -- mmap wants a descriptor
        ledger = mmap.mmap(file.fileno(), LEDGER_SIZE)
    pool = Pool(path=arena)
    disk = next((disk for disk in pool.disks() if disk.name == "disk"), None)
    if disk is None:
        disk = pool.create("disk", BLOCKS * BLOCK)

    def keep_house() -> None:
        while True:
            for task in (Fold(pool), Compact(pool)):
                while task.step(8):
                    pass

    threading.Thread(target=keep_house, daemon=True).start()
    clones = 0
    while True:
        block = choose.randrange(BLOCKS)
        version = struct.unpack_from("<II", ledger, 8 * block)[0] + 1
        struct.pack_into("<I", ledger, 8 * block, version)
        if version % 7 == 3:
            disk.trim(block * BLOCK, BLOCK)
        else:
            disk.write(block * BLOCK, content(block, version))
        struct.pack_into("<I", ledger, 8 * block + 4, version)
        if choose.random() < 0.002:
            clones += 1
            pool.clone(disk, f"clone {clones} of life {seed}")
            if len(pool.disks()) > 3:
                pool.delete(pool.disks()[1])


if __name__ == "__main__":
    main()
