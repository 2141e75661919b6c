"""The engine beside a plain dictionary: what both are asked to do, and that they agree.

Used by a stateful property test, a long seeded run, and the failure injection: one set of steps for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from nbdzram.engine.arena import allocations_left, fail_allocation
from nbdzram.engine.check import Check
from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import Report
from nbdzram.engine.run import Run
from nbdzram.errors import ArenaError, PoolFull
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text

DISK_BLOCKS = 1100  # more than two leaves
DISK_SIZE = DISK_BLOCKS * BLOCK - 1000  # the last block is not a whole one
DISKS = 5

KINDS: tuple[Callable[[int], bytes], ...] = (
    lambda number: bytes([number % 256]) * BLOCK,
    lambda number: random.Random(number % 6).randbytes(8) * (BLOCK // 8),
    lambda number: noise(number % 8),
    lambda number: text(number % 20),
    lambda number: half_random(number % 40, 64 + number % 40 * 90),
    lambda number: (
        (b"%d prose and verse " % (number % 30) * 300)[: BLOCK - 7] + random.Random(number % 30).randbytes(7)
    ),
    half_random,
)


def content(kind: int, number: int, length: int) -> bytes:
    """`length` bytes of blocks that often equal other calls' blocks."""
    make = KINDS[kind % len(KINDS)]
    blocks = b"".join(make(number + index // 2) for index in range(-(-length // BLOCK) + 1))
    return blocks[:length]


class Pair:
    """An engine pool and its model: exports by name, each a bytearray."""

    def __init__(
        self, path: str | None = None, *, mem_limit: int = 0, inline_dedup: bool = False, mask: int = -1
    ) -> None:
        self.path = path
        self.mask = mask & (2**64 - 1)
        self.pool = Pool(path=path, mem_limit=mem_limit, inline_dedup=inline_dedup, fingerprint_mask=self.mask)
        self.models: dict[str, bytearray] = {}
        self.tasks: dict[str, Run[Report]] = {}
        self.names = 0
        self.clock = 0

    def disk(self, choice: int) -> Disk:
        names = sorted(self.models)
        return next(disk for disk in self.pool.disks() if disk.name == names[choice % len(names)])

    # Each step takes plain numbers, so that a property test can shrink them.

    def create(self) -> None:
        if len(self.models) < DISKS:
            self.names += 1
            self.pool.create(f"disk {self.names:03}", DISK_SIZE)
            self.models[f"disk {self.names:03}"] = bytearray(DISK_SIZE)

    def clone(self, choice: int) -> None:
        if len(self.models) < DISKS:
            self.names += 1
            source = self.disk(choice)
            self.pool.clone(source, f"disk {self.names:03}", read_only=bool(choice % 2))
            self.models[f"disk {self.names:03}"] = bytearray(self.models[source.name])

    def delete(self, choice: int) -> None:
        if len(self.models) > 1:
            disk = self.disk(choice)
            del self.models[disk.name]
            self.pool.delete(disk)

    def write(self, choice: int, offset: int, length: int, kind: int, number: int) -> None:
        disk = self.disk(choice)
        offset, length = clip(offset, length)
        new = content(kind, number, length)
        self._change(disk, offset, new, lambda: disk.write(offset, new))

    def zero(self, choice: int, offset: int, length: int, *, no_hole: bool) -> None:
        disk = self.disk(choice)
        offset, length = clip(offset, length)
        self._change(disk, offset, bytes(length), lambda: disk.zero(offset, length, no_hole=no_hole))

    def trim(self, choice: int, offset: int, length: int) -> None:
        disk = self.disk(choice)
        first, end = -(-offset // BLOCK) * BLOCK, (offset + clip(offset, length)[1]) // BLOCK * BLOCK
        offset, length = clip(offset, length)
        may_keep = self.pool.mem_limit or allocations_left() >= 0
        disk.trim(offset, length)
        model = self.models[disk.name]
        for at in range(first, end, BLOCK):  # where a clone shares the table and there is no room to copy, it stays
            if not may_keep or disk.read(at, BLOCK) != model[at : at + BLOCK]:
                model[at : at + BLOCK] = bytes(BLOCK)

    def read(self, choice: int, offset: int, length: int) -> None:
        disk = self.disk(choice)
        offset, length = clip(offset, length)
        assert disk.read(offset, length) == self.models[disk.name][offset : offset + length]

    def begin(self, name: str) -> None:
        """Begin a run; step() goes on with it, so that other steps come between."""
        makers: dict[str, Callable[[], Run[Report]]] = {
            "fold": lambda: Fold(self.pool),
            "fold dry": lambda: Fold(self.pool, dry_run=True),
            "compact": lambda: Compact(self.pool),
            "recompress": lambda: Recompress(self.pool, idle_seconds=self.clock % 3, dictionary=self.clock % 2 == 1),
            "check": lambda: Check(self.pool),
        }
        self.tasks[name] = makers[name]()

    def step(self, name: str, budget: int) -> None:
        if name in self.tasks and not self.tasks[name].step(budget):
            del self.tasks[name]

    def finish_fold(self) -> None:
        run(Fold(self.pool))
        assert run(Fold(self.pool)).objects_merged == 0
        distinct = {
            bytes(model[at : at + BLOCK]).ljust(BLOCK, b"\0")
            for model in self.models.values()
            for at in range(0, DISK_SIZE, BLOCK)
        }
        assert self.pool.stats().objects == sum(1 for block in distinct if block != block[:8] * (BLOCK // 8))

    def tick(self, seconds: int) -> None:
        self.clock += seconds
        self.pool.set_clock(self.clock)

    def reopen(self) -> None:
        """As after a kill: everything derived is rebuilt from the file."""
        if self.path is None:
            return
        before = self.pool.stats()
        limit, inline = self.pool.mem_limit, self.pool.inline_dedup
        self.tasks.clear()
        self.pool.close()
        try:
            self.pool = Pool(path=self.path, mem_limit=limit, inline_dedup=inline, fingerprint_mask=self.mask)
        except ArenaError:  # an allocation failed: that changes nothing in the file
            fail_allocation(-1)
            self.pool = Pool(path=self.path, mem_limit=limit, inline_dedup=inline, fingerprint_mask=self.mask)
        after = self.pool.stats()
        for name in (
            "orig_data_size",
            "compr_data_size",
            "same_pages",
            "objects",
            "handles",
            "shared_objects",
            "shared_bytes",
            "compr_by_codec",
        ):
            assert getattr(before, name) == getattr(after, name), name
        assert after.mem_used_total <= before.mem_used_total

    def check(self) -> None:
        planned = allocations_left()  # a failure is meant for the engine, not for whoever checks it
        fail_allocation(-1)
        self.pool.check()
        fail_allocation(planned)
        stats = self.pool.stats()
        assert not stats.mem_limit or stats.memory_used <= stats.mem_limit

    def compare(self) -> None:
        assert sorted(disk.name for disk in self.pool.disks()) == sorted(self.models)
        for disk in self.pool.disks():
            assert disk.read(0, DISK_SIZE) == self.models[disk.name], disk.name
            at = 0
            for length, bits in disk.extents(0, DISK_SIZE, 1 << 20):
                if bits & Extent.ZERO:
                    assert not any(self.models[disk.name][at : at + length])
                at += length
            assert at == DISK_SIZE

    def _change(self, disk: Disk, offset: int, new: bytes, act: Callable[[], None]) -> None:
        """Do it. When it is refused, each block has its old or its new content, and the model learns which."""
        model = self.models[disk.name]
        try:
            act()
        except PoolFull:
            for start in range(offset - offset % BLOCK, offset + len(new), BLOCK):
                end = min(start + BLOCK, DISK_SIZE)
                low, high = max(start, offset), min(end, offset + len(new))
                found = disk.read(start, end - start)
                old = bytes(model[start:end])
                changed = old[: low - start] + new[low - offset : high - offset] + old[high - start :]
                assert found in (old, changed), f"block {start // BLOCK} of {disk.name} is a mixture"
                model[start:end] = found
        else:
            model[offset : offset + len(new)] = new


def clip(offset: int, length: int) -> tuple[int, int]:
    return offset, min(length, DISK_SIZE - offset)


def random_step(pair: Pair, choose: random.Random) -> None:
    """One step of a long run. Weighted so that pools fill, and folding has something to do."""
    offset = choose.randrange(DISK_SIZE)
    if choose.random() < 0.7:
        offset -= offset % BLOCK
    length = choose.choice((1, 100, BLOCK, BLOCK, 3 * BLOCK, 5000, 20000))
    choice = choose.randrange(100)

    def step_all() -> None:
        for name in list(pair.tasks):
            pair.step(name, choose.randrange(1, 200))

    steps: tuple[tuple[float, Callable[[], object]], ...] = (
        (60, lambda: pair.write(choice, offset, length, choose.randrange(7), choose.randrange(1000))),
        (6, lambda: pair.trim(choice, offset, length * choose.choice((1, 1, 300)))),
        (6, lambda: pair.zero(choice, offset, length * choose.choice((1, 1, 100)), no_hole=choose.random() < 0.5)),
        (10, lambda: pair.read(choice, offset, length)),
        (4, lambda: pair.begin(choose.choice(("fold", "compact", "recompress")))),
        (8, step_all),
        (0.5, pair.create),
        (0.6, lambda: pair.clone(choice)),
        (0.5, lambda: pair.delete(choice)),
        (1, lambda: pair.tick(1)),
        (0.2, pair.finish_fold),
        (0.3, pair.reopen),
        (2, lambda: fail_allocation(choose.randrange(10))),
    )
    choose.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()
