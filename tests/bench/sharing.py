"""`make sharing`: what threads that read and write one pool take from each other's memory, without their processors.

python -m tests.bench.sharing [--threads N] [--top N]

A line of memory that one processor wrote and another one wants has to travel between them, some hundred nanoseconds,
and one that all of them write is had by one at a time: that is what keeps sixteen processors from doing sixteen times
as much. The engine is built with what its compiler tells a thread sanitizer, and sharing.c, in the sanitizer's place,
counts the lines that each thread finds taken by another. Threads go one request at a time, in turn, so the figures are
the same on any machine; what they cost is another matter, for one travels while others are worked with.

Each thread has 4,000 blocks of its own in one export, and reads or overwrites them at random: what they meet at is the
engine's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import Figure, print_table
from tests.bench.measure import BLOCK, MIB
from tests.support.programs import require_program
from tests.support.sanitized import built_for

BLOCKS = 4000  # of each thread
REQUESTS = 1500  # of each thread, counted; as many before, so that what it keeps at hand is as it stays
HALF = (BLOCK // 2,)
ALL_SIZES = tuple(range(BLOCK // 5, BLOCK * 4 // 5, 48))
LOADS = {
    "read": ("read", HALF),
    "overwritten, alike": ("write", HALF),
    "overwritten, of all sizes": ("write", ALL_SIZES),
}
"""What a request is, and how much of a block does not compress."""
AT_MOST = {"read": 0.05, "overwritten, alike": 12.0, "overwritten, of all sizes": 16.0}
"""Lines a block that a thread of eight finds taken. Nine of an overwrite's are the index's, which is one table."""
PYTHONS = ("Py_", "_Py", "__Pyx", "__pyx_pw_")
"""What a call from Python does to objects that threads share, as their counts of references; clients make none."""
PLACES_MAX = 1 << 16


class Place(ctypes.Structure):
    """As in sharing.c."""

    _fields_ = (("place", ctypes.c_uint64), ("misses", ctypes.c_uint64))


@dataclass(frozen=True, slots=True)
class Shared:
    """Of one load, by function and line."""

    lines: Counter[str]

    @property
    def total(self) -> float:
        """Lines a block."""
        return sum(self.lines.values()) / 1000


def measure_sharing(directory: Path, threads: int) -> dict[str, Shared]:
    """Build for it, and count each load in a process of its own."""
    copy, environment = built_for("thread", directory, own_runtime=True)
    runtime = directory / "sharing.so"
    compiler = require_program("gcc", package="gcc")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-w", "-o", runtime, source, "-ldl"], check=True)
    found = {}
    for load in LOADS:
        child = [sys.executable, "-m", "tests.bench.sharing", "--load", load, "--threads", str(threads), str(runtime)]
        told = subprocess.run(
            child, cwd=copy, env=environment | {"LD_PRELOAD": str(runtime)}, check=True, capture_output=True, text=True
        )
        found[load] = Shared(Counter(json.loads(told.stdout)))
    return found


def figures_of(found: dict[str, Shared]) -> list[Figure]:
    """Against what is kept."""
    return [
        Figure(f"lines taken from others, a block {load}", shared.total, AT_MOST[load], False, "")
        for load, shared in found.items()
    ]


# -- in the process that is counted ----------------------------------------------------------------------------------


def count(load: str, threads: int, runtime: Path) -> Counter[str]:
    """Thousandths of lines a block, by place."""
    sharing = ctypes.CDLL(str(runtime))
    _take_turns(sharing, load, threads)
    room = (Place * PLACES_MAX)()
    told = room[: sharing.sharing_places(room, PLACES_MAX)]
    named: Counter[str] = Counter()
    for place, name in zip(told, _names([one.place for one in told]), strict=True):
        if not name.startswith(PYTHONS):
            named[name] += place.misses
    requests = threads * REQUESTS
    return Counter({name: round(1000 * misses / requests) for name, misses in named.items()})


def _take_turns(sharing: ctypes.CDLL, load: str, threads: int) -> None:
    from nbdzram.engine.pool import Pool  # of the copy that is instrumented, in this process alone

    kind, lengths = LOADS[load]
    apart = (BLOCKS * BLOCK // (2 * MIB) + 1) * 2 * MIB  # no two in one leaf
    disk = Pool().create("disk", threads * apart)
    turns = [threading.Semaphore(0) for _ in range(threads)]

    def block(dice: random.Random) -> bytes:
        return dice.randbytes(dice.choice(lengths)).ljust(BLOCK, b"\0")

    def steps(number: int) -> Iterator[None]:
        """One request each."""
        dice, first = random.Random(number), number * apart
        for at in range(BLOCKS):
            disk.write(first + at * BLOCK, block(dice))
            yield
        for done in range(2 * REQUESTS):
            if done == REQUESTS:
                sharing.sharing_count(1)
            offset = first + dice.randrange(BLOCKS) * BLOCK
            if kind == "read":
                disk.read(offset, BLOCK)
            else:
                disk.write(offset, block(dice))
            yield
        sharing.sharing_count(0)

    def go(number: int) -> None:
        sharing.sharing_watch(number)
        for _ in steps(number):
            turns[(number + 1) % threads].release()
            turns[number].acquire()
        sharing.sharing_watch(-1)
        turns[(number + 1) % threads].release()

    def wait_and_go(number: int) -> None:
        turns[number].acquire()
        go(number)

    crowd = [threading.Thread(target=wait_and_go, args=(number,)) for number in range(threads)]
    for thread in crowd:
        thread.start()
    turns[0].release()
    for thread in crowd:
        thread.join()


def _names(places: list[int]) -> Iterator[str]:
    """The innermost function of each, and where its caller is written."""
    program = require_program("addr2line", package="binutils")
    ranges = []
    bases: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        if len(words) > 5:
            start, end = (int(word, 16) for word in words[0].split("-"))
            bases.setdefault(words[5], start)
            ranges.append((start, end, words[5]))
    for place in places:
        file = next((file for start, end, file in ranges if start <= place < end), "")
        if "nbdzram" not in Path(file).name and "/nbdzram/" not in file:
            yield "__pyx_pw_ elsewhere"  # Python's own, and its locks
            continue
        asked = [program, "-f", "-i", "-s", "-e", file, hex(place - bases[file] - 1)]
        told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
        yield " < ".join(name.removeprefix("__pyx_f_7nbdzram_") for name in told[0:4:2]) + f" ({told[1]})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--top", type=int, default=12, help="places that are printed of each load")
    parser.add_argument("--load", choices=LOADS, help=argparse.SUPPRESS)
    parser.add_argument("runtime", nargs="?", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.load:
        json.dump(count(words.load, words.threads, words.runtime), sys.stdout)
        return os.EX_OK
    with tempfile.TemporaryDirectory(prefix="nbdzram-sharing-") as directory:
        found = measure_sharing(Path(directory), words.threads)
    for load, shared in found.items():
        sys.stdout.write(f"{load}, {words.threads} threads: {shared.total:.2f} lines a block\n")
        for place, thousandths in shared.lines.most_common(words.top):
            sys.stdout.write(f"  {thousandths / 1000:6.3f} {place}\n")
    print_table(figures_of(found))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
