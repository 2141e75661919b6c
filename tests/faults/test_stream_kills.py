"""A process killed right before or behind any publication while it receives a stream: the disks are all there, or none.

The stream brings a disk, a clone of it and what changed since a snapshot that the pool has, into a pool that holds some
of its content already. The process kills itself at the n-th moment (nbdzram/engine/publish.pyx), for n further and
further apart, as most of them are alike. The pool is opened as a server opens it that remembered the disks when all of
them were whole.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from nbdzram.engine import moment
from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import kill_at_publish
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text
from tests.unit.stream.roads import receive, sent, whole

MIB = 1 << 20
STRIDE = 1.1  # from one moment to the next that is tried, beyond the first and the last ones
ALL_BELOW = 40


def the_stream() -> tuple[bytes, bytes, dict[str, bytes]]:
    """One of the snapshot, one of what came later, and what it brings."""
    with Pool() as pool:
        disk = pool.create("disk", 4 * MIB + 100)
        disk.write(0, b"".join([text(1), noise(2), half_random(3), b"8 bytes!" * 512] * 2))
        monday = pool.clone(disk, "monday", read_only=True)
        monday.identify(77)
        first = sent(monday)
        disk.write(2 * MIB, half_random(5) + noise(6))
        disk.trim(0, BLOCK)
        fresh = pool.create("fresh", MIB)
        fresh.write(0, text(9) + half_random(3))
        clone = pool.clone(fresh, "clone")
        clone.write(BLOCK, noise(8))
        stream = sent(disk, fresh, clone, bases={"disk": monday}, origins={"clone": 1})
        return first, stream, {one.name: whole(one) for one in (disk, fresh, clone)}


def prepare(path: Path, first: bytes) -> int:
    """A pool with the base and a disk of its own; how many objects it holds."""
    with Pool(path=str(path)) as pool:
        for received in receive(pool, first):
            moment.finish(received.disk)
            moment.reveal(received.disk)
        pool.create("own", MIB).write(0, text(1) + half_random(5))
        return pool.stats().objects


def receive_until(path: Path, stream: bytes, moment_number: int) -> bool:
    """In a process that is killed at that moment. Whether it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            pool = Pool(path=str(path))
            kill_at_publish(moment_number)
            disks = [received.disk for received in receive(pool, stream)]
            for disk in disks:
                moment.finish(disk)
            (path.parent / "remembered").touch()
            for disk in disks:
                moment.reveal(disk)
            kill_at_publish(0)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent reads the status
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) or status == 0, status
    return status == 0


def opened(path: Path) -> tuple[Pool, dict[str, Disk]]:
    """As a server does: what it remembers is revealed, the rest is deleted."""
    pool = Pool(path=str(path))
    remembered = (path.parent / "remembered").exists()
    for disk in moment.concealed(pool):
        if remembered:
            moment.reveal(disk)
        else:
            pool.delete(disk)
    return pool, {disk.name: disk for disk in pool.disks()}


def test_a_receive_killed_at_any_moment_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    first, stream, brings = the_stream()
    number, ended, outcomes = 1, False, set()
    while not ended:
        place = tmp_path / str(number)
        place.mkdir()
        path = place / "arena"
        held = prepare(path, first)
        ended = receive_until(path, stream, number)
        pool, disks = opened(path)
        with pool:
            run(Check(pool))
            pool.check()
            came = brings.keys() & disks.keys()
            outcomes.add(len(came))
            assert disks.keys() - brings.keys() == {"own", "monday"}
            assert {name: whole(disks[name]) for name in came} in ({}, brings), number
            assert disks["own"].read(0, 2 * BLOCK) == text(1) + half_random(5)
            if not came:
                assert pool.stats().objects == held  # nothing of the stream is left
        path.unlink()
        number = number + 1 if number < ALL_BELOW else int(number * STRIDE) + 1
    assert outcomes == {0, 3}
