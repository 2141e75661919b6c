"""Blocks for the engine's tests: each kind of content that the engine treats differently."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypeVar

from nbdzram.engine.reports import Report
from nbdzram.engine.run import Run

R = TypeVar("R", bound=Report)

BLOCK = 4096
AT_HAND = 8  # handles that a thread takes at a time to write with; free cells until they are used
LETTERS = "etaoinshrdlu"
WORDS = ["".join(random.Random(number).choices(LETTERS, k=3 + number % 7)) for number in range(400)]


def text(number: int) -> bytes:
    """A block that compresses well and is unlike every other number's."""
    return (b"%d is the number of this block. " % number * 512)[:BLOCK]


def half_random(number: int, random_bytes: int = 2048) -> bytes:
    """A block that compresses to about `random_bytes`."""
    return random.Random(number).randbytes(random_bytes) + bytes(BLOCK - random_bytes)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * BLOCK


def noise(number: int) -> bytes:
    """A block that does not compress."""
    return random.Random(number).randbytes(BLOCK)


def prose(number: int) -> bytes:
    """A block of words: Zstandard makes it a good deal shorter than LZ4 does."""
    choose = random.Random(number)
    return " ".join(choose.choice(WORDS) for _ in range(800)).encode()[:BLOCK]


def run(task: Run[R], budget: int = 64) -> R:
    """Step a task to its end, and return its report."""
    while task.step(budget):
        pass
    return task.report()
