"""A process killed at any instruction leaves every block with its old or its new content.

The writer (tests/faults/writer.py) is stopped wherever it happens to be, its arena is copied as it lies there, and the
copy is opened like after a kill. At the end it is really killed, and a second life goes on with the same file.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaError
from tests.faults.writer import BLOCK, BLOCKS, LEDGER_SIZE, content
from tests.support.arena import Arena
from tests.unit.engine.blocks import run


@contextmanager
def writing(place: Path, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    ledger = place / "ledger"
    if not ledger.exists():
        ledger.write_bytes(bytes(LEDGER_SIZE))
    command = [sys.executable, "-m", "tests.faults.writer", str(place / "arena"), str(ledger), str(seed)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finished(place: Path) -> int:
    return sum(struct.unpack_from("<II", (place / "ledger").read_bytes(), 8 * block)[1] for block in range(BLOCKS))


def wait_for_writes(place: Path, process: subprocess.Popen[bytes], count: int) -> None:
    while finished(place) < count:
        assert process.poll() is None, "the writer ended by itself"


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def verify(arena: Path, ledger: bytes, seed: int) -> None:
    pool = Pool(path=str(arena))
    pool.check()
    disks = [disk for disk in pool.disks() if disk.name == "disk"]
    for disk in disks:
        for block in range(BLOCKS):
            begun, done = struct.unpack_from("<II", ledger, 8 * block)
            found = disk.read(block * BLOCK, BLOCK)
            assert found in (content(block, done), content(block, begun)), f"block {block}, seed {seed}"
    before = [disk.read(0, BLOCKS * BLOCK) for disk in pool.disks()]
    run(Fold(pool))
    run(Compact(pool))
    pool.check()
    assert [disk.read(0, BLOCKS * BLOCK) for disk in pool.disks()] == before
    pool.close()


def kill_rounds(place: Path, rounds: int, stops: int) -> None:
    seed = random.randrange(1 << 30)
    choose = random.Random(seed)
    for life in range(rounds):
        with writing(place, seed + life) as process:
            for _ in range(stops):
                wait_for_writes(place, process, finished(place) + choose.randrange(1, 300))
                stop(process)
                shutil.copyfile(place / "arena", place / "copy")
                verify(place / "copy", (place / "ledger").read_bytes(), seed)
                (place / "copy").unlink()
                process.send_signal(signal.SIGCONT)
            wait_for_writes(place, process, finished(place) + choose.randrange(1, 300))
        ledger = bytearray((place / "ledger").read_bytes())
        verify(place / "arena", bytes(ledger), seed)
        # The next life counts on from what is there: a write that was cut off may have been made or not.
        pool = Pool(path=str(place / "arena"))
        disk = next(disk for disk in pool.disks() if disk.name == "disk")
        for block in range(BLOCKS):
            begun, done = struct.unpack_from("<II", ledger, 8 * block)
            if begun != done:
                disk.write(block * BLOCK, content(block, begun))
                struct.pack_into("<I", ledger, 8 * block + 4, begun)
        pool.close()
        (place / "ledger").write_bytes(ledger)


def test_every_block_is_old_or_new_wherever_the_process_is_killed(place: Path) -> None:
    kill_rounds(place, rounds=3, stops=6)


@pytest.mark.slow
def test_every_block_is_old_or_new_over_many_kills(place: Path) -> None:
    kill_rounds(place, rounds=40, stops=25)


def test_an_arena_in_use_is_refused(place: Path) -> None:
    with Pool(path=str(place / "arena")), pytest.raises(ArenaError, match="in use"):
        Pool(path=str(place / "arena"))


def test_a_file_that_is_no_arena_is_refused_and_left_alone(place: Path) -> None:
    for size in (100, 1 << 24):
        (place / "file").write_bytes(b"precious" * (size // 8))
        with pytest.raises(ArenaError, match="not an"):
            Pool(path=str(place / "file"))
        assert (place / "file").read_bytes() == b"precious" * (size // 8)


def test_a_damaged_arena_is_refused_with_the_reason(place: Path) -> None:
    pool = Pool(path=str(place / "arena"))
    pool.create("disk", 1 << 30).write(0, random.Random(1).randbytes(1 << 20))
    pool.close()
    damaged = bytearray((place / "arena").read_bytes())
    struct.pack_into("<Q", damaged, Arena(damaged).root(), 0xFFFFFF << 32)
    (place / "arena").write_bytes(damaged)
    with pytest.raises(ArenaError, match="damaged: the block table"):
        Pool(path=str(place / "arena"))
