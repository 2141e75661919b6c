"""`make bench-scaling`: what more connections, more threads and more processors bring, ours beside others', in one run.

    python -m tests.bench.scaling [--seconds N] [--most-connections N] [NAME...]     NAME: as in TABLES

Servers: ours; eight of ours, a connection each (what our own code does when nothing is shared); nbdkit's memory plugin
with both of its plain allocators; and the floor (floor.c), which copies memory and does nothing else. fio loads them
from the same machine, over unix sockets, with blocks that compress to half. Each cell is thousand requests a second,
with the processors that the server used in brackets. The engine alone is read and written by threads, without a socket.

It takes about five minutes, and writes .cache/scaling.json beside what it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from tests.bench.content import CACHE
from tests.bench.floor import Floor
from tests.bench.measure import MIB, fill, timed_load
from tests.support.pki import Pki
from tests.support.programs import require_program, run
from tests.support.reach import TrustingUser, tls_arguments, trusting_user
from tests.support.server import Nbdkit, Nbdzram, ServerProcess, free_port

SIZE = 256 * MIB
MOST_CONNECTIONS = 32
SEPARATE = 8
ENGINE_BLOCKS = 32768  # 128 MiB: more than any cache, and stored in a second
ENGINE_STEP = 256 << 10  # bytes a call: from here on the engine works without the interpreter lock


@dataclass(frozen=True, slots=True)
class Load:
    """What fio is told."""

    kind: str
    block: str
    depth: int

    def __str__(self) -> str:
        return f"{self.block} {self.kind}, depth {self.depth}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement."""

    table: str
    row: str
    column: str
    rate: float  # requests a second, or blocks a second of an engine
    processors: float
    p99_us: float = 0.0

    def __str__(self) -> str:
        amount = self.rate / 1000
        return f"{amount:.0f} ({self.processors:.1f})" if amount >= 100 else f"{amount:.1f} ({self.processors:.1f})"


class Separate:
    """Several servers of ours behind one face: each is given its share of the connections."""

    def __init__(self, directory: Path, count: int) -> None:
        self.servers = []
        for number in range(count):
            place = directory / str(number)
            place.mkdir()
            self.servers.append(Nbdzram(place, {"disk": SIZE}))

    def stop(self) -> None:
        """End all of them."""
        for server in self.servers:
            server.stop()


def peers(directory: Path) -> Iterator[tuple[str, ServerProcess]]:
    """Those that are compared, started one after another."""
    kinds: dict[str, Callable[[Path], ServerProcess]] = {
        "nbdzram": lambda place: Nbdzram(place, {"disk": SIZE}),
        "nbdkit memory, sparse": lambda place: Nbdkit(place, str(SIZE), allocator="sparse"),
        "nbdkit memory, malloc": lambda place: Nbdkit(place, str(SIZE), allocator="malloc"),
        "the floor": lambda place: Floor(place, SIZE),
    }
    for name, start in kinds.items():
        place = directory / name.replace(" ", "-")
        place.mkdir()
        yield name, start(place)


def loaded(
    server: ServerProcess, load: Load, connections: int, seconds: int, tls: TrustingUser | None = None
) -> tuple[float, float, float]:
    """Requests a second, processors used by the server, and the 99th percentile in microseconds."""
    found = timed_load(
        server,
        load.kind,
        SIZE,
        seconds=seconds,
        block=load.block,
        depth=load.depth,
        connections=connections,
        tls=tls,
    )
    return found.iops, found.iops * found.cpu_us / 1e6, found.p99_us


def columns(most: int) -> list[int]:
    return [count for count in (1, 2, 4, 8, 16, 32) if count <= most]


SMALL = (Load("randread", "4k", 32), Load("randwrite", "4k", 32))
LARGE = (Load("read", "256k", 8), Load("write", "256k", 8))


def measure_connections(directory: Path, seconds: int, most: int, loads: Sequence[Load]) -> Iterator[Cell]:
    """Each server with more and more connections."""
    for name, server in peers(directory):
        with server:
            fill(server, SIZE)
            for load in loads:
                for count in columns(most):
                    depth = max(1, min(load.depth, 256 // count))  # 32 connections x depth 8, as racks have it
                    asked = Load(load.kind, load.block, depth)
                    rate, processors, p99 = loaded(server, asked, count, seconds)
                    yield Cell(f"{load.block} {load.kind}", name, str(count), rate, processors, p99)


def measure_alone(directory: Path, seconds: int, _: int) -> Iterator[Cell]:
    """Depth 1 on one connection, where a swapping or booting client lives."""
    for name, server in peers(directory):
        with server:
            fill(server, SIZE)
            for kind in ("randread", "randwrite"):
                rate, processors, p99 = loaded(server, Load(kind, "4k", 1), 1, seconds)
                yield Cell("4k, depth 1", name, kind, rate, processors, p99)


def measure_separate(directory: Path, seconds: int, most: int) -> Iterator[Cell]:
    """Eight servers of ours, a connection each: what nothing shared would give."""
    count = min(SEPARATE, most)
    group = Separate(directory, count)
    try:
        for server in group.servers:
            fill(server, SIZE)
        for load in SMALL:
            with ThreadPoolExecutor(count) as pool:
                ask = partial(loaded, load=load, connections=1, seconds=seconds)
                cells = list(pool.map(ask, group.servers))
            rate, processors = (sum(cell[place] for cell in cells) for place in (0, 1))
            yield Cell(f"{load.block} {load.kind}", f"{count} x nbdzram", str(count), rate, processors)
    finally:
        group.stop()


def measure_tls(directory: Path, seconds: int, most: int) -> Iterator[Cell]:
    """The same over TLS on TCP."""
    pki = Pki(directory / "pki")
    files = pki.client_directory(directory / "client", None)
    pki.issue("localhost", file="server")
    for name in ("nbdzram", "nbdkit memory, sparse"):
        place = directory / name.replace(" ", "-")
        place.mkdir()
        server: ServerProcess
        if name == "nbdzram":
            server = Nbdzram(place, {"disk": SIZE}, arguments=tls_arguments(pki, mode="require", client_ca=False))
        else:
            arguments = ["--tls=require", f"--tls-certificates={pki.directory}"]
            server = Nbdkit(place, str(SIZE), port=free_port(), arguments=arguments)
        with server, trusting_user(files) as user:
            loaded(server, Load("write", "256k", 8), 1, seconds, user)
            for load in (*SMALL, *LARGE):
                for count in (1, min(8, most)):
                    rate, processors, p99 = loaded(server, load, count, seconds, user)
                    yield Cell(f"TLS, {load.block} {load.kind}", name, str(count), rate, processors, p99)


# -- the engine alone -----------------------------------------------------------------------------------------------


def content(seed: int) -> bytes:
    """A step's bytes, of which half compress away, different for every seed."""
    dice = random.Random(seed)
    return b"".join(dice.randbytes(2048) + bytes(2048) for _ in range(ENGINE_STEP // 4096))


def busy_threads(works: Sequence[Callable[[], int]], seconds: int) -> float:
    """Blocks a second of all of them together; each work does some and says how many blocks it was."""
    done = [0] * len(works)
    stop = threading.Event()

    def repeat(number: int) -> None:
        while not stop.is_set():
            done[number] += works[number]()

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(works))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    passed = time.monotonic() - started
    for thread in threads:
        thread.join()
    return sum(done) / passed


def engine_work(disk: Disk, seed: int, writing: bool) -> Callable[[], int]:
    """Read or overwrite a step at a random place; how many blocks that was."""
    dice = random.Random(seed)
    buffer = bytearray(ENGINE_STEP)
    contents = [content(seed * 8 + number) for number in range(8)] if writing else []

    def work() -> int:
        offset = dice.randrange(ENGINE_BLOCKS * 4096 // ENGINE_STEP) * ENGINE_STEP
        if writing:
            disk.write(offset, dice.choice(contents))
        else:
            disk.read_into(offset, buffer)
        return ENGINE_STEP // 4096

    return work


@contextmanager
def filled_pools(count: int) -> Iterator[list[Disk]]:
    with ExitStack() as stack:
        disks = []
        for number in range(count):
            pool = stack.enter_context(Pool())
            disk = pool.create("disk", ENGINE_BLOCKS * 4096)
            for offset in range(0, ENGINE_BLOCKS * 4096, ENGINE_STEP):
                disk.write(offset, content(offset // ENGINE_STEP % 64 + 64 * number))
            disks.append(disk)
        yield disks


def measure_engine(_: Path, seconds: int, __: int) -> Iterator[Cell]:
    """Threads in one pool, and in a pool each."""
    processors = len(os.sched_getaffinity(0))
    counts = [count for count in (1, 2, 4, 8, 16) if count <= processors]
    for row, separate in (("one pool", False), ("a pool for each thread", True)):
        for count in counts:
            with filled_pools(count if separate else 1) as disks:
                for writing in (False, True):
                    works = [engine_work(disks[n % len(disks)], n, writing) for n in range(count)]
                    before = time.process_time()
                    rate = busy_threads(works, seconds)
                    used = (time.process_time() - before) / seconds
                    yield Cell(
                        "engine, blocks written" if writing else "engine, blocks read", row, str(count), rate, used
                    )


TABLES: dict[str, Callable[[Path, int, int], Iterator[Cell]]] = {
    "small": partial(measure_connections, loads=SMALL),
    "separate": measure_separate,
    "large": partial(measure_connections, loads=LARGE),
    "alone": measure_alone,
    "tls": measure_tls,
    "engine": measure_engine,
}


def print_tables(cells: Sequence[Cell]) -> None:
    """Thousands a second, and in brackets the processors that were used for it."""
    for table in dict.fromkeys(cell.table for cell in cells):
        of_table = [cell for cell in cells if cell.table == table]
        names = list(dict.fromkeys(cell.column for cell in of_table))
        print(f"\n{table:24}" + "".join(f"{name:>14}" for name in names))
        for row in dict.fromkeys(cell.row for cell in of_table):
            found = {cell.column: str(cell) for cell in of_table if cell.row == row}
            print(f"{row:24}" + "".join(f"{found.get(name, ''):>14}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scaling", description="Measure what more cores bring.")
    parser.add_argument("--seconds", type=int, default=2, help="of each cell")
    parser.add_argument("--most-connections", type=int, default=MOST_CONNECTIONS, metavar="N")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; default all")
    given = parser.parse_args()
    for name in given.names:
        if name not in TABLES:
            parser.error(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    usable = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {usable} of {os.cpu_count()} processors, Linux {platform.release()}")
    print("thousand requests (engine: blocks) a second, processors used by the server in brackets")
    require_program("fio", package="fio")
    run(["sync"])
    cells: list[Cell] = []
    for name in given.names or TABLES:
        with tempfile.TemporaryDirectory(prefix="nbdzram-scaling-") as directory:
            found = list(TABLES[name](Path(directory), given.seconds, given.most_connections))
        print_tables(found)
        cells += found
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "scaling.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=2))


if __name__ == "__main__":
    main()
