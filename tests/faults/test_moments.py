"""A process killed right before or right behind any publication leaves each block old or new, and nothing half made.

A story is told to a process that kills itself at the n-th moment (nbdzram/engine/publish.pyx), for every n until the
story comes to its end. After each kill the arena is opened: the step that was under way is undone or done, a write of
several blocks each for itself; everything before it is as it was, what was deleted is gone, and the engine's own check
of contents and counts finds nothing. Now and then opening is killed as well, and the arena opened once more.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.publish import kill_at_publish
from nbdzram.engine.recompress import Recompress
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text

MIB = 1 << 20
LEAF = 2 * MIB
SIZE = 2 * LEAF  # two leaves

Contents = dict[str, bytearray]


class Told:
    """The story's world: a pool, and what its exports hold by a plain model. Without a pool it only imagines."""

    def __init__(self, pool: Pool | None) -> None:
        self.pool = pool
        self.contents: Contents = {}

    def disk(self, name: str) -> Disk:
        assert self.pool is not None
        return next(disk for disk in self.pool.disks() if disk.name == name)


Step = Callable[[Told], None]


def create(name: str, size: int = SIZE) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.pool.create(name, size)
        told.contents[name] = bytearray(size)

    return step


def clone(source: str, name: str) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.pool.clone(told.disk(source), name)
        told.contents[name] = bytearray(told.contents[source])

    return step


def delete(name: str) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.pool.delete(told.disk(name))
        del told.contents[name]

    return step


def rename(name: str, new_name: str) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.pool.rename(told.disk(name), new_name)
        told.contents = {new_name if each == name else each: held for each, held in told.contents.items()}

    return step


def write(name: str, offset: int, content: bytes) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.disk(name).write(offset, content)
        told.contents[name][offset : offset + len(content)] = content

    return step


def trim(name: str, offset: int, length: int) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.disk(name).trim(offset, length)
        told.contents[name][offset : offset + length] = bytes(length)

    return step


def resize(name: str, size: int) -> Step:
    def step(told: Told) -> None:
        if told.pool:
            told.disk(name).resize(size)
        told.contents[name] = told.contents[name][:size].ljust(size, b"\0")

    return step


def maintain(*kinds: Callable[[Pool], Fold | Compact | Recompress]) -> Step:
    def step(told: Told) -> None:
        for kind in kinds if told.pool else ():
            assert told.pool is not None
            run(kind(told.pool))

    return step


def recompress_with_dictionary(pool: Pool) -> Recompress:
    return Recompress(pool, dictionary=True)


def blocks(*numbers: int) -> bytes:
    return b"".join(half_random(number, 300 + 400 * (number % 9)) for number in numbers)


FILL = (1 << 62).to_bytes(8, "little") * (BLOCK // 8)  # does not fit a table's entry

STORIES: dict[str, list[Step]] = {
    "writes": [
        create("disk"),
        write("disk", 0, text(1) + noise(1) + b"\x07" * BLOCK + FILL),
        write("disk", 0, noise(2) + text(2) + text(3) + b"\x07" * BLOCK),
        write("disk", LEAF - 100, text(4)),  # the end of one leaf, the beginning of another
        write("disk", 5, b"a part"),
        trim("disk", BLOCK, BLOCK),
        trim("disk", LEAF, LEAF),
        write("disk", LEAF, text(5)),
    ],
    "clones": [
        create("disk"),
        write("disk", 0, blocks(1, 2, 3)),
        clone("disk", "twin"),
        write("twin", BLOCK, noise(1)),
        write("disk", 0, text(9)),
        clone("twin", "third"),
        trim("third", 0, LEAF),
        write("third", LEAF, text(1)),
        delete("disk"),
        create("again"),
        write("again", 0, noise(7)),
        delete("twin"),
        write("third", 0, text(6)),
    ],
    "folding": [
        create("disk"),
        write("disk", 0, blocks(1, 2, 1, 2) + noise(1) * 2 + text(1)),
        create("other"),
        write("other", 0, blocks(2, 1) + noise(1)),
        maintain(Fold),
        write("disk", 0, text(3)),
        maintain(Recompress),
        write("other", 3 * BLOCK, blocks(1) + prose(1) + text(1)),
        maintain(Recompress, Fold),
        delete("disk"),
        write("other", 0, text(8)),
    ],
    "compaction": [
        create("disk"),
        write("disk", 0, b"".join(half_random(number, 1000) for number in range(40))),
        *[trim("disk", block * BLOCK, BLOCK) for block in range(0, 40, 3)],
        *[trim("disk", block * BLOCK, BLOCK) for block in range(1, 40, 3)],
        maintain(Compact),
        write("disk", 0, half_random(50, 1000)),
    ],
    "sizes": [
        create("disk"),
        write("disk", 0, blocks(1, 2, 3, 4)),
        write("disk", LEAF + BLOCK, blocks(5, 6)),
        clone("disk", "twin"),
        resize("disk", LEAF + BLOCK + 100),
        resize("disk", SIZE),
        resize("disk", BLOCK + 7),
        resize("disk", SIZE),
        write("disk", LEAF, blocks(8)),
        resize("twin", LEAF),
        resize("twin", SIZE),
    ],
    "names": [
        create("disk"),
        write("disk", 0, blocks(1, 2)),
        rename("disk", "other"),
        rename("other", "disk" * 60),
        write("disk" * 60, BLOCK, blocks(3)),
        rename("disk" * 60, "disk"),
        resize("disk", SIZE + BLOCK),
        create("other"),
        rename("other", "another"),
        delete("disk"),
        create("o" * 255),
    ],
}
"""Each in so many words as its kind of publication needs: every moment of it is tried."""


def tell(path: Path, story: list[Step], moment: int, step_now: mmap.mmap) -> bool:
    """Tell the story to a process that dies at this moment; True when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            told = Told(Pool(path=str(path)))
            kill_at_publish(moment)
            for number, step in enumerate(story):
                step_now[0] = number
                step(told)
            kill_at_publish(0)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFEXITED(status)


def open_and_die(path: Path, moment: int) -> None:
    """Open the arena in a process that dies at this moment of it, if there is such a one."""
    child = os.fork()
    if child == 0:
        try:
            kill_at_publish(moment)
            Pool(path=str(path))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def imagined(story: list[Step], steps: int) -> Contents:
    told = Told(None)
    for step in story[:steps]:
        step(told)
    return told.contents


def verify(path: Path, before: Contents, after: Contents, where: str) -> None:
    with Pool(path=str(path)) as pool:
        run(Check(pool))
        found = {disk.name: disk.read(0, disk.size_bytes) for disk in pool.disks()}
        assert len(found) in {len(before), len(after)}, f"{sorted(found)} are there, {where}"
        for name in before.keys() | after.keys():
            if name not in found:
                assert name not in before or name not in after, f"{name} is missing, {where}"
                continue
            olds = [state[name] for state in (before, after) if name in state]
            assert len(found[name]) in {len(old) for old in olds}, f"the size of {name}, {where}"
            for at in range(0, len(found[name]), BLOCK):
                block = found[name][at : at + BLOCK]
                assert any(block == old[at : at + BLOCK] for old in olds), f"block {at // BLOCK} of {name}, {where}"
        assert found.keys() <= before.keys() | after.keys()
        run(Fold(pool))
        run(Compact(pool))
        for disk in pool.disks():
            disk.resize(disk.size_bytes + 3 * BLOCK)  # nothing old lies behind the end
            grown = disk.read(0, disk.size_bytes)
            assert grown == found[disk.name].ljust(len(grown), b"\0"), f"{disk.name} grown, {where}"
        pool.check()
        for disk in pool.disks():
            pool.delete(disk)
        stats = pool.stats()
        assert stats.handles == stats.objects == stats.mem_used_total == stats.orig_data_size == 0, where
        pool.check()


def every_moment(place: Path, story: list[Step], *, first: int = 1, step: int = 1) -> int:
    """Try every moment, or one in `step`; how many there were."""
    path = place / "arena"
    step_now = mmap.mmap(-1, 1)
    moment = first
    while True:
        path.unlink(missing_ok=True)
        ended = tell(path, story, moment, step_now)
        number = step_now[0]
        where = f"killed at moment {moment}, in step {number}"
        open_and_die(path, 1 + moment % 11)
        if ended:
            done = imagined(story, len(story))
            verify(path, done, done, "at the end")
            return moment
        verify(path, imagined(story, number), imagined(story, number + 1), where)
        moment += step


@pytest.mark.parametrize("name", STORIES)
def test_a_process_killed_at_any_moment_of_a_story_leaves_old_or_new(place: Path, name: str) -> None:
    assert every_moment(place, STORIES[name]) > 30


def test_a_dictionary_is_written_before_it_is_named(place: Path) -> None:
    """Training takes a while, so only the moments around it are tried: objects come to need it right behind them."""
    prepared = [create("disk", SIZE), write("disk", 0, b"".join(prose(number) for number in range(300)))]
    path = place / "arena"
    with Pool(path=str(path)) as pool:
        told = Told(pool)
        for step in prepared:
            step(told)
    image = path.read_bytes()
    for moment in range(1, 12):
        path.write_bytes(image)
        child = os.fork()
        if child == 0:
            try:
                pool = Pool(path=str(path))
                task = recompress_with_dictionary(pool)
                kill_at_publish(moment)
                run(task)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        verify(path, told.contents, told.contents, f"killed at moment {moment} of a recompression")
