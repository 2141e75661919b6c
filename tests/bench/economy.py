"""What the engine's economy costs and saves on blocks made for the purpose: figures for `make bench-memory`.

Times are of this thread's processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import random
import sysconfig
import time
from pathlib import Path

from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from tests.bench.figures import Figure
from tests.bench.measure import BLOCK, MIB
from tests.support.server import Nbdzram

GIB = 1 << 30
GIB_BLOCKS = GIB // BLOCK
REQUEST_BLOCKS = 64  # 256 KiB: the client's request
DISTINCT = 4096  # contents that the blocks of a fold repeat
INLINE_BLOCKS = 32768  # 128 MiB


def block(number: int) -> bytes:
    """Half random, half zeroes: LZ4 makes about 2 KiB of it."""
    return random.Random(number).randbytes(BLOCK // 2) + bytes(BLOCK // 2)


def write_all(disk: Disk, blocks: list[bytes]) -> float:
    """One behind the other, each request in the cache as if just received; the processor seconds of the writes."""
    buffer = bytearray(REQUEST_BLOCKS * BLOCK)
    seconds = 0.0
    for at in range(0, len(blocks), REQUEST_BLOCKS):
        buffer[:] = b"".join(blocks[at : at + REQUEST_BLOCKS])
        started = time.thread_time()
        disk.write(at * BLOCK, buffer)
        seconds += time.thread_time() - started
    return seconds


def finish_timed(fold: Fold) -> float:
    started = time.thread_time()
    while fold.step():
        pass
    return time.thread_time() - started


def measure_fold() -> list[Figure]:
    """A gigabyte in which nearly every block has a twin, so that a fold has to look at nearly every one; and again."""
    contents = [block(number) for number in range(DISTINCT)]
    with Pool() as pool:
        disk = pool.create("disk", GIB)
        for start in range(0, GIB_BLOCKS, DISTINCT):
            random.Random(start).shuffle(contents)
            for at in range(0, DISTINCT, REQUEST_BLOCKS):
                disk.write((start + at) * BLOCK, b"".join(contents[at : at + REQUEST_BLOCKS]))
        first = Fold(pool)
        seconds = finish_timed(first)
        second = Fold(pool)
        again = finish_timed(second)
        merged = first.report().objects_merged
    assert merged == GIB_BLOCKS - DISTINCT
    detail = f"{merged} objects merged in {seconds:.2f} s"
    return [
        Figure("fold of 1 GiB, every block a suspect, GB/s of one core", GIB / seconds / 1e9, 2, True, detail),
        Figure("second fold: objects merged", second.report().objects_merged, 0, False, ""),
        Figure("second fold / first, time", again / seconds, 0.05, False, f"{again * 1e6:.0f} us"),
    ]


def source_text() -> list[bytes]:
    """Distinct blocks of this Python's library, whole requests of them."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = b"".join(path.read_bytes() for path in sources if "site-packages" not in path.parts)
    distinct = list({text[at : at + BLOCK] for at in range(0, len(text) - BLOCK, BLOCK)})
    return distinct[: len(distinct) // REQUEST_BLOCKS * REQUEST_BLOCKS]


def measure_inline() -> list[Figure]:
    """Wholly duplicate writes against unique ones, both where content is looked up before it is compressed.

    Of text, which LZ4 works on, and of half random blocks, which it gives up on early: the least that can be spared.
    """
    contents = {"text": source_text(), "half random": [block(number) for number in range(INLINE_BLOCKS)]}
    figures = []
    for name, blocks in contents.items():
        twins = random.Random(1).sample(blocks, len(blocks))
        with Pool(inline_dedup=True) as pool:
            unique = write_all(pool.create("unique", GIB), blocks) / len(blocks)
            duplicate = write_all(pool.create("duplicate", GIB), twins) / len(blocks)
            assert pool.stats().objects == len(blocks)
        detail = f"{duplicate * 1e6:.2f} and {unique * 1e6:.2f} us a block"
        figures.append(Figure(f"duplicates / unique, inline, {name}", unique / duplicate, 2, True, detail))
    return figures


def measure_empty(directory: Path) -> list[Figure]:
    """A server with one empty export: what the export's size adds to the process."""
    resident = {}
    for size in ("1G", "1T"):
        place = directory / size
        place.mkdir()
        with Nbdzram(place, {"disk": size}) as server:
            resident[size] = server.resident_bytes()
    more = (resident["1T"] - resident["1G"]) / MIB
    return [
        Figure("resident, empty 1 TiB export less 1 GiB export, MiB", more, 8, False, f"{resident['1G'] / MIB:.0f} MiB")
    ]


def measure_clone() -> list[Figure]:
    """A clone of a full gigabyte, and what a stored block costs beside its bytes."""
    with Pool() as pool:
        disk = pool.create("disk", GIB)
        empty = pool.stats().metadata
        body = random.Random(1).randbytes(600) + bytes(BLOCK - 604)
        for start in range(0, GIB_BLOCKS, REQUEST_BLOCKS):
            numbers = range(start, start + REQUEST_BLOCKS)
            disk.write(start * BLOCK, b"".join(number.to_bytes(4, "little") + body for number in numbers))
        before = pool.stats()
        started = time.perf_counter()
        pool.clone(disk, "clone")
        took = time.perf_counter() - started
        after = pool.stats()
    stored = (after.objects - before.objects) + (after.mem_used_total - before.mem_used_total)
    assert before.objects == GIB_BLOCKS
    return [
        Figure("clone of 1 GiB, ms", took * 1e3, 50, False, ""),
        Figure("clone of 1 GiB, stored again", stored, 0, False, "objects and bytes"),
        Figure("metadata of a stored block, bytes", (before.metadata - empty) / GIB_BLOCKS, 32, False, ""),
    ]


def measure_economy(directory: Path) -> list[Figure]:
    return [*measure_fold(), *measure_inline(), *measure_empty(directory), *measure_clone()]
