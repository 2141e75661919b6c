"""A server whose clients write and flush while everything else goes on, and what its exports held at each step.

    python -m tests.faults.power.story --seed 1 --steps 400 --directory DIR --history FILE

Steps are made one after the other; each is a version of all exports. Beside them run flushes, checkpoints, folds,
compactions and recompressions, and servers end and begin from what is there. Before and behind each step, and when a
flush is answered, a mark is written among the recorded acts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import pickle
import random
from array import array
from pathlib import Path
from typing import Any

from nbdzram.config import CheckpointConfig, Durability, ExportConfig, PoolConfig, ServerConfig
from nbdzram.engine.disk import Disk
from nbdzram.errors import UserError
from nbdzram.server import checkpoints, journal, segments
from nbdzram.server.service import Service
from nbdzram.status import RunOptions
from tests.faults.power.disk import MARKS
from tests.unit.engine.blocks import BLOCK, half_random, noise, text

BLOCKS = 64
LARGEST = 2 * BLOCKS
NEVER = 10**6
CONTENTS = 400
"""Different ones, so that there is something to fold."""

Contents = dict[str, bytes]
"""By export: a number of 2 bytes for each block, 0 for zeroes."""


def same(number: int) -> bytes:
    """A block that repeats 8 bytes."""
    return number.to_bytes(8, "little") * (BLOCK // 8)


def content(number: int) -> bytes:
    """The block of this number."""
    if number == 0:
        return bytes(BLOCK)
    return (noise, half_random, text, same)[number % 4](number)


class Story:
    """One, with its dice."""

    def __init__(self, seed: int, directory: Path, *, begins_again: bool) -> None:
        self.dice = random.Random(seed)
        self.exports: dict[str, array[int]] = {"a": array("H", [0] * BLOCKS), "b": array("H", [0] * BLOCKS)}
        self.history: list[Contents] = [self.now()]
        self.config = ServerConfig(
            exports=tuple(ExportConfig(name=name, size_bytes=BLOCKS * BLOCK) for name in self.exports),
            pools=(PoolConfig(durability=Durability.FLUSH),),
            tcp=(),
            checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER),
        )
        self.service = Service(self.config)
        self.begins_again = begins_again
        self._marks = os.open(directory / MARKS, os.O_WRONLY | os.O_CREAT)
        self._beside: set[asyncio.Task[Any]] = set()
        self._names = 0

    def now(self) -> Contents:
        return {name: blocks.tobytes() for name, blocks in self.exports.items()}

    def mark(self, what: str, version: int) -> None:
        os.write(self._marks, f"{what} {version}\n".encode())

    async def play(self, steps: int) -> None:
        await self.service.start(listen=False)
        for _ in range(steps):
            self.begin_something()
            version = len(self.history)
            act = self.dice.choices(list(ACTS), list(ACTS.values()))[0]
            if all("@" in name for name in self.exports):
                act = Story.add
            self.mark("begun", version)
            await act(self)
            self.history.append(self.now())
            self.mark("done", version)
        await asyncio.gather(*self._beside, return_exceptions=True)
        await self.service.stop()

    # ---- beside the steps ----

    def begin_something(self) -> None:
        roll = self.dice.random()
        if roll < 0.5:
            self.beside(self.flush(len(self.history) - 1))
        elif roll < 0.55:
            self.beside(self.service._checkpoints.take())
        elif roll < 0.6:
            self.beside(self.maintain(self.dice.choice(["fold", "compact", "recompress"])))

    def beside(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def flush(self, version: int) -> None:
        log = self.service._checkpoints.journal
        assert log is not None
        await log.synced()
        self.mark("flushed", version)

    async def maintain(self, kind: str) -> None:
        options = RunOptions(level=3, idle_seconds=0) if kind == "recompress" else RunOptions()
        with contextlib.suppress(UserError):
            await self.service.run(kind, options, pool=None, cpu_percent=100, progress=lambda *_: None)

    # ---- steps ----

    def some(self, *, written: bool = True) -> str:
        names = [name for name in self.exports if not (written and "@" in name)]
        return self.dice.choice(names)

    def disk(self, name: str) -> Disk:
        return self.service._exports.get(name).disk

    def fresh(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    async def write(self) -> None:
        name = self.some()
        at, number = self.dice.randrange(len(self.exports[name])), self.dice.randrange(1, CONTENTS)
        self.disk(name).write(at * BLOCK, content(number))
        self.exports[name][at] = number
        if self.dice.random() < 0.3:
            await asyncio.sleep(0)

    async def trim(self) -> None:
        name = self.some()
        count = self.dice.randrange(1, 8)
        at = self.dice.randrange(len(self.exports[name]) - count)
        self.disk(name).trim(at * BLOCK, count * BLOCK)
        self.exports[name][at : at + count] = array("H", [0] * count)

    async def write_several(self) -> None:
        name = self.some()
        count = self.dice.randrange(2, 8)
        at = self.dice.randrange(len(self.exports[name]) - count)
        numbers = [self.dice.randrange(1, CONTENTS) for _ in range(count)]
        self.disk(name).write(at * BLOCK, b"".join(map(content, numbers)))
        self.exports[name][at : at + count] = array("H", numbers)

    async def rest(self) -> None:
        await asyncio.sleep(self.dice.random() * 0.01)

    async def copy(self) -> None:
        name, fresh = self.some(), self.fresh("c")
        if len(self.exports) < 8:
            await self.service.changes.copy_export(name, fresh, read_only=False)
            self.exports[fresh] = array("H", self.exports[name])

    async def snapshot(self) -> None:
        if len(self.exports) < 8:
            moment = self.fresh("m")
            await self.service.changes.take_moment(moment)
            for name in [name for name in self.exports if "@" not in name]:
                self.exports[f"{name}@{moment}"] = array("H", self.exports[name])

    async def roll_back(self) -> None:
        snapshots = [name for name in self.exports if "@" in name and name.split("@")[0] in self.exports]
        if snapshots:
            snapshot = self.dice.choice(snapshots)
            name = snapshot.split("@")[0]
            if len(self.exports[name]) == len(self.exports[snapshot]):
                await self.service.changes.rollback_export(name, snapshot, force=False)
                self.exports[name] = array("H", self.exports[snapshot])

    async def resize(self) -> None:
        name = self.some()
        count = self.dice.randrange(BLOCKS // 2, LARGEST)
        await self.service.changes.resize_export(name, count * BLOCK, yes=True, force=False)
        self.exports[name] = array("H", [*self.exports[name][:count], *[0] * (count - len(self.exports[name]))])

    async def remove(self) -> None:
        name = self.some(written=False)
        if len(self.exports) > 2:
            await self.service.changes.remove_export(name, force=False)
            del self.exports[name]

    async def add(self) -> None:
        name = self.fresh("d")
        rules = ("pool", "read_only", "description", "allow_addresses", "allow_certificates")
        given: dict[str, Any] = dict.fromkeys(rules)
        given["private"] = self.dice.random() < 0.5
        await self.service.changes.add_export(name, BLOCKS * BLOCK, **given)
        self.exports[name] = array("H", [0] * BLOCKS)

    async def rename(self) -> None:
        name, fresh = self.some(), self.fresh("r")
        await self.service.changes.rename_export(name, fresh)
        self.exports = {fresh if known == name else known: blocks for known, blocks in self.exports.items()}

    async def begin_again(self) -> None:
        """As when the process is killed: no checkpoint is taken, and what was not flushed would be gone."""
        if not self.begins_again:
            return
        await asyncio.gather(*self._beside, return_exceptions=True)
        found = self.service._checkpoints
        assert found.settling is not None
        await found.settling.settle()
        self.mark("flushed", len(self.history) - 1)
        found.stop = functools.partial(found.stop, last=False)  # type: ignore[method-assign]
        await self.service.stop()
        self.service = Service(self.config)
        await self.service.start(listen=False)
        assert {export.name for export in self.service._exports} == self.exports.keys()

    async def reset(self) -> None:
        name = self.some()
        await self.service.changes.reset_export(name, force=False)
        self.exports[name] = array("H", [0] * len(self.exports[name]))


ACTS = {
    Story.write: 60,
    Story.write_several: 6,
    Story.trim: 6,
    Story.rest: 8,
    Story.add: 2,
    Story.copy: 3,
    Story.snapshot: 1,
    Story.roll_back: 2,
    Story.resize: 3,
    Story.remove: 4,
    Story.rename: 2,
    Story.reset: 1,
    Story.begin_again: 2,
}


def main() -> None:
    """Play one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--begins-again", action="store_true")
    given = parser.parse_args()
    segments.ROOM_BYTES = 32 << 10  # so that files grow, and are used again
    journal.LONG_BYTES = 256 << 10
    checkpoints.LONGEST_CHAIN = 3
    checkpoints.AGAIN_SECONDS = 0.001  # where the disk fails too

    async def tell() -> None:
        story = Story(given.seed, given.directory, begins_again=given.begins_again)
        await story.play(given.steps)
        given.history.write_bytes(pickle.dumps(story.history))

    asyncio.run(tell())


if __name__ == "__main__":
    main()
