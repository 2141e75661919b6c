"""Damage to an arena, by seed: what memory that fails, a stray pointer or a copy that broke off would leave.

An image is a file's pages that are not zero, and its size. So a damaged arena is written in a millisecond, and its
holes stay holes.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdzram.engine.check import Check
from nbdzram.engine.compact import Compact
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import Report
from nbdzram.engine.run import Run
from nbdzram.errors import CheckFailed, EngineError, PoolFull
from tests.faults.contents import BLOCK, FAR, NEAR
from tests.support.arena import EXPORTS_AT, FIRST_UNIT, PAGE, SEGMENTS_AT, UNIT

ZERO_PAGE = bytes(PAGE)


@dataclass(frozen=True)
class Image:
    """A file's content."""

    pages: dict[int, bytes]
    size: int

    @staticmethod
    def of(path: Path) -> Image:
        content = path.read_bytes()
        starts = range(0, len(content), PAGE)
        pages = {at: content[at : at + PAGE] for at in starts if any(content[at : at + PAGE])}
        return Image(pages, len(content))

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            for at, page in self.pages.items():
                os.pwrite(file.fileno(), page, at)
            file.truncate(self.size)

    def word(self, at: int) -> bytes:
        return self.pages.get(at // PAGE * PAGE, ZERO_PAGE)[at % PAGE : at % PAGE + 8]

    def with_word(self, at: int, word: bytes) -> Image:
        page = bytearray(self.pages.get(at // PAGE * PAGE, ZERO_PAGE))
        page[at % PAGE : at % PAGE + 8] = word
        others = {start: content for start, content in self.pages.items() if start != at // PAGE * PAGE}
        return Image(others | ({at // PAGE * PAGE: bytes(page)} if any(page) else {}), self.size)


@dataclass(frozen=True)
class Damage:
    """What was done, and where: the words that differ."""

    kind: str
    places: tuple[int, ...]
    image: Image


def fixed_places(image: Image) -> list[int]:
    """Words of superblock and directories, and zero ones beside them."""
    pages = [at for at in image.pages if at < FIRST_UNIT * UNIT]
    used = [at + index for at in pages for index in range(0, PAGE, 8) if any(image.word(at + index))]
    return [
        *used,
        *range(0, 512, 8),
        *range(SEGMENTS_AT, SEGMENTS_AT + 64, 8),
        *range(EXPORTS_AT, EXPORTS_AT + 4096, 8),
    ]


def cell_places(image: Image) -> list[int]:
    """Words of the first segment's cells that are in use."""
    (unit,) = struct.unpack_from("<I", image.pages[SEGMENTS_AT])
    places = range(unit * UNIT, unit * UNIT + 4 * PAGE, 8)
    return [at for at in places if any(image.word(at))]


def other_places(image: Image) -> list[int]:
    """Any word of a page in use: nodes, objects, dictionaries."""
    return [at + index for at in image.pages if at >= FIRST_UNIT * UNIT for index in range(0, PAGE, 8)]


KINDS_OF_PLACES = (fixed_places, cell_places, other_places)
SHARES = (2, 3, 5)


def flips(image: Image, seeds: range) -> Iterator[tuple[int, int, int]]:
    """Single bits, by seed: the seed, the word, and its bit."""
    places = [find(image) for find in KINDS_OF_PLACES]
    for seed in seeds:
        choose = random.Random(seed)
        yield seed, choose.choice(choose.choices(places, SHARES)[0]), choose.randrange(64)


def flipped(image: Image, at: int, bit: int) -> Damage:
    """One bit of the word at a place is another."""
    word = int.from_bytes(image.word(at), "little") ^ 1 << bit
    return Damage("bit", (at,), image.with_word(at, word.to_bytes(8, "little")))


def damaged(image: Image, seed: int) -> Damage:
    """One damage."""
    choose = random.Random(seed)
    places = choose.choices(KINDS_OF_PLACES, SHARES)[0](image)
    at, other = choose.choice(places), choose.choice(places)
    word = int.from_bytes(image.word(at), "little")
    kind = choose.choice(("bit", "bit", "bits", "cleared", "random", "copied", "swapped", "half", "truncated"))
    if kind == "truncated":
        end = choose.randrange(image.size + 1) // choose.choice((1, UNIT)) * choose.choice((1, UNIT))
        end = max(1, min(end, image.size))  # an empty file is one in which nothing was stored yet
        pages = {start: page[: end - start] for start, page in image.pages.items() if any(page[: max(0, end - start)])}
        return Damage(kind, (end,), Image(pages, end))
    if kind == "swapped":
        swapped = image.with_word(at, image.word(other)).with_word(other, image.word(at))
        return Damage(kind, (at, other), swapped)
    changed = {
        "bit": word ^ 1 << choose.randrange(64),
        "bits": word ^ sum({1 << choose.randrange(64) for _ in range(3)}),
        "cleared": 0,
        "random": choose.getrandbits(64),
        "copied": int.from_bytes(image.word(other), "little"),
        "half": word & 0xFFFFFFFF if choose.random() < 0.5 else word & ~0xFFFFFFFF,
    }[kind]
    return Damage(kind, (at,), image.with_word(at, changed.to_bytes(8, "little")))


def use(pool: Pool, seed: int) -> None:
    """Do what clients and operators do; none of it may end the process, whatever it says."""
    choose = random.Random(seed)
    finish(Check(pool))
    for disk in pool.disks():
        for _ in range(30):
            block = choose.choice((choose.randrange(NEAR), FAR + choose.randrange(70)))
            try:
                disk.read(block * BLOCK, 3 * BLOCK)
                disk.write(block * BLOCK + choose.choice((0, 0, 100)), choose.randbytes(choose.choice((BLOCK, 500))))
                disk.trim(choose.randrange(NEAR) * BLOCK, 3 * BLOCK)
                disk.extents(0, NEAR * BLOCK, 1000)
            except (EngineError, PoolFull, ValueError):  # also: a size that is none
                pass
        disk.usage()
    for run in (Fold(pool), Recompress(pool, level=1), Compact(pool)):
        finish(run)
    for disk in pool.disks()[:1]:
        with contextlib.suppress(EngineError, PoolFull, ValueError):
            pool.clone(disk, "one more").resize(BLOCK)
        pool.delete(disk)


def finish(run: Run[Report]) -> None:
    """To its end, or to what it finds."""
    try:
        while run.step(1000):
            pass
    except CheckFailed:
        pass
