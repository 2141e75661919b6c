"""`make bench`: the figures that a release must reach, as a table. Both sides of each ratio in one run, medians.

python -m tests.bench.acceptance [--rounds N] [--seconds N] [NAME...]     NAME: speed, copy, latency, memory
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from nbdzram.control.client import ControlClient
from nbdzram.engine.pool import HUGE_THRESHOLD
from tests.bench.content import CACHE, count_distinct, ext4_gibibyte
from tests.bench.measure import BLOCK, MIB, copy_seconds, fill, fio, median, percentile, random_load
from tests.support.server import Nbdkit, Nbdzram, ServerProcess

GIB = 1 << 30
SPEED_BYTES = 512 * MIB
SETTLE_SECONDS = 2  # of undisturbed requests before and after a fold, inside one fio run


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    what: str
    measured: float
    required: float
    at_least: bool
    detail: str

    @property
    def reached(self) -> bool:
        return self.measured >= self.required if self.at_least else self.measured <= self.required


@dataclass(frozen=True, slots=True)
class Effort:
    rounds: int
    seconds: int


def start_peer(name: str, directory: Path, size: int) -> ServerProcess:
    directory.mkdir()
    match name:
        case "nbdzram":
            return Nbdzram(directory, {"disk": size})
        case "nbdkit-memory":
            return Nbdkit(directory, str(size))
        case "nbdkit-zstd":
            return Nbdkit(directory, str(size), allocator="zstd")
    raise ValueError(name)


# Reads alone cannot be four times nbdkit-zstd's: uncompressed nbdkit is 1.5 times as fast there, and then fio itself is
# the limit. So the two are compared where both have work to do.
REQUIRED_SPEED = {
    "randwrite": {"nbdkit-memory": 1.0, "nbdkit-zstd": 4.0},
    "randread": {"nbdkit-memory": 1.0},
    "randrw": {"nbdkit-memory": 1.0, "nbdkit-zstd": 4.0},
}
PEERS = ("nbdzram", "nbdkit-memory", "nbdkit-zstd")


def measure_speed(directory: Path, effort: Effort) -> list[Figure]:
    """4 KiB random requests, queue depth 32, one connection, unix socket."""
    peers = {name: start_peer(name, directory / f"speed-{name}", SPEED_BYTES) for name in PEERS}
    figures = []
    try:
        for peer in peers.values():
            fill(peer, directory, SPEED_BYTES)
        for kind in ("randwrite", "randread", "randrw"):
            loads: dict[str, list[float]] = {name: [] for name in PEERS}
            costs: dict[str, list[float]] = {name: [] for name in PEERS}
            for _ in range(effort.rounds):
                for name, peer in peers.items():
                    load = random_load(peer, directory, kind, SPEED_BYTES, depth=32, seconds=effort.seconds)
                    loads[name].append(load.iops)
                    costs[name].append(load.cpu_us)
            detail = ", ".join(
                f"{name} {median(loads[name]) / 1000:.1f}k at {median(costs[name]):.1f} us" for name in PEERS
            )
            ours = median(loads["nbdzram"])
            for peer_name, required in REQUIRED_SPEED[kind].items():
                ratio = ours / median(loads[peer_name])
                figures.append(Figure(f"4 KiB {kind}, depth 32 / {peer_name}", ratio, required, True, detail))
    finally:
        for peer in peers.values():
            peer.stop()
    return figures


def measure_copy(directory: Path, effort: Effort) -> list[Figure]:
    """A real ext4 image of 1 GiB in with nbdcopy, into a fresh server each time."""
    image = ext4_gibibyte()
    names = ("nbdzram", "nbdkit-zstd")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(effort.rounds):
        for name in names:
            with start_peer(name, directory / f"copy-{number}-{name}", GIB) as server:
                seconds[name].append(copy_seconds(server, image))
    ours, theirs = (median(seconds[name]) for name in names)
    detail = f"nbdzram {1024 / ours:.0f} MiB/s, nbdkit zstd {1024 / theirs:.0f} MiB/s"
    return [Figure("1 GiB ext4 image in, nbdcopy / nbdkit zstd", theirs / ours, 1.5, True, detail)]


def measure_latency(directory: Path, effort: Effort) -> list[Figure]:
    """p99 at 4 KiB, depth 1, of the requests that ended while a fold of 1 GiB ran, and of those outside it."""
    ratios, details = [], []
    for number in range(effort.rounds):
        place = directory / f"latency-{number}"
        with start_peer("nbdzram", place, GIB) as server:
            assert isinstance(server, Nbdzram)
            # Half of the blocks have a twin, so that there is something to fold.
            fill(server, place, GIB, "--dedupe_percentage=50")
            inside, outside = latencies_around_a_fold(server, place)
        during, without = percentile(inside, 99), percentile(outside, 99)
        ratios.append(during / without)
        details.append(f"{during:.0f}/{without:.0f} us ({len(inside)} requests in it)")
    return [Figure("p99 at depth 1, while 1 GiB folds / without", median(ratios), 2.0, False, ", ".join(details))]


def latencies_around_a_fold(server: Nbdzram, directory: Path) -> tuple[list[float], list[float]]:
    """Microseconds of single requests, by fio's own log: those during the fold, those without."""
    window: list[float] = []

    def fold() -> None:
        # Asked for in this process: a command's start-up would compete for the processors inside the window.
        with ControlClient(server.control) as control:
            time.sleep(SETTLE_SECONDS)
            started = time.time()
            control.call("run", kind="fold")
            window.extend([started, time.time()])

    folding = Thread(target=fold)
    folding.start()
    fio(
        server,
        directory,
        *(
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=1",
            "--size=1g",
            "--time_based",
            f"--runtime={SETTLE_SECONDS * 4}",
        ),
        *(f"--write_lat_log={directory}/log", "--log_unix_epoch=1", "--disable_slat=1", "--disable_clat=1"),
    )
    folding.join()
    start, end = window
    inside: list[float] = []
    outside: list[float] = []
    for line in (directory / "log_lat.1.log").read_text().splitlines():
        milliseconds, nanoseconds = (int(word) for word in line.split(",")[:2])
        (inside if start <= milliseconds / 1000 <= end else outside).append(nanoseconds / 1000)
    assert len(inside) > 100, f"a fold of {end - start:.3f} s left too few requests to judge: {len(inside)}"
    return inside, outside


def measure_memory(directory: Path, _: Effort) -> list[Figure]:
    """What a gigabyte costs beyond its compressed bytes, and what is left to fold."""
    figures = []
    with start_peer("nbdzram", directory / "resident", GIB) as server:
        assert isinstance(server, Nbdzram)
        fill(server, directory, GIB)
        beyond = (server.resident_bytes() - server.mm_stat()[2]) / MIB
        limit = 64 + 32 * (GIB // BLOCK) / MIB
        figures.append(Figure("resident less mem_used_total, MiB, 1 GiB stored", beyond, limit, False, ""))
    image = ext4_gibibyte()
    with start_peer("nbdzram", directory / "density", GIB) as server:
        assert isinstance(server, Nbdzram)
        copy_seconds(server, image)
        server.fold()
        server.compact()
        used = server.mm_stat()[2]
        with server.client() as client:
            distinct = count_distinct(client.read_all(4 * MIB), huge_threshold=HUGE_THRESHOLD)
        ratio = used / distinct.compressed_bytes
        detail = f"{used / MIB:.1f} MiB for {distinct.compressed_bytes / MIB:.1f} MiB in {distinct.blocks} objects"
        figures.append(Figure("mem_used_total folded, compacted / distinct bytes", ratio, 1.03, False, detail))
        left = server.pool_status()["objects"] - distinct.blocks
        figures.append(Figure("duplicates left after a fold", left, 0, False, "counted with SHA-256 over NBD"))
    return figures


MEASUREMENTS: dict[str, Callable[[Path, Effort], list[Figure]]] = {
    "speed": measure_speed,
    "copy": measure_copy,
    "latency": measure_latency,
    "memory": measure_memory,
}


def print_table(figures: list[Figure]) -> None:
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        verdict = "ok" if figure.reached else "NOT REACHED"
        print(f"{figure.what:52} {figure.measured:8.2f}  {sign} {figure.required:<6.4g} {verdict:12} {figure.detail}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a release must reach.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each fio run")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}; default all")
    given = parser.parse_args()
    effort = Effort(given.rounds, given.seconds)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}, {given.rounds} rounds")
    figures: list[Figure] = []
    for name in given.names or MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix="nbdzram-bench-") as directory:
            measured = MEASUREMENTS[name](Path(directory), effort)
        print_table(measured)
        figures += measured
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "acceptance.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=2))


if __name__ == "__main__":
    main()
