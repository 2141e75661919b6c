"""`make bench`: the figures that a release must reach, as a table. Both sides of each ratio in one run, medians.

python -m tests.bench.acceptance [--rounds N] [--seconds N] [NAME...]     NAME: as in MEASUREMENTS
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Event, Thread, get_native_id

from nbdzram.control.client import ControlClient
from nbdzram.engine.pool import HUGE_THRESHOLD
from tests.bench import caged, holds, lasting, onlookers, pauses, scrape, speed, starting, strangers
from tests.bench.content import CACHE, count_distinct, ext4_gibibyte
from tests.bench.figures import Figure, print_table
from tests.bench.measure import BLOCK, MIB, copy_seconds, fill, fio, median, percentile, timed_load
from tests.bench.speed import GIB, SPEED_BYTES, Effort, start_peer
from tests.faults.crowd import LONG, Crowd, half_a_write, many_descriptors, reads
from tests.support.pki import Pki
from tests.support.reach import tls_arguments
from tests.support.server import Nbdzram

SETTLE_SECONDS = 3  # of undisturbed requests before a run, inside one fio run


def measure_copy(directory: Path, effort: Effort) -> list[Figure]:
    """A real ext4 image of 1 GiB in with nbdcopy, into a fresh server each time."""
    image = ext4_gibibyte()
    names = ("nbdzram", "nbdkit-zstd")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(effort.rounds):
        for name in names:
            with start_peer(name, directory / f"copy-{number}-{name}", GIB) as server:
                seconds[name].append(copy_seconds(image, server.uri()))
    ours, theirs = (median(seconds[name]) for name in names)
    detail = f"nbdzram {1024 / ours:.0f} MiB/s, nbdkit zstd {1024 / theirs:.0f} MiB/s"
    return [Figure("1 GiB ext4 image in, nbdcopy / nbdkit zstd", theirs / ours, 1.5, True, detail)]


def measure_latency(directory: Path, effort: Effort) -> list[Figure]:
    """p99 at 4 KiB, depth 1, of the requests that ended while a run over 1 GiB was under way, and of the others."""
    ratios: dict[str, list[float]] = {}
    details: dict[str, list[str]] = {}
    for number in range(effort.rounds):
        place = directory / f"latency-{number}"
        with start_peer("nbdzram", place, GIB) as server:
            assert isinstance(server, Nbdzram)
            # Half of the blocks have a twin, so that there is something to fold.
            fill(server, GIB, "--dedupe_percentage=50")
            for kind in ("fold", "compact", "recompress", "check"):
                if kind == "compact":  # every second object goes, and leaves a hole
                    fio(server, "--rw=randtrim", "--bs=4k", "--iodepth=32", "--size=1g", "--io_size=512m")
                inside, outside = latencies_around(kind, server, place)
                during, without = percentile(inside, 99), percentile(outside, 99)
                ratios.setdefault(kind, []).append(during / without)
                details.setdefault(kind, []).append(f"{during:.0f}/{without:.0f} us ({len(inside)} in it)")
    return [
        Figure(
            f"p99 at depth 1, during a {kind} of 1 GiB / without", median(found), 1.25, False, ", ".join(details[kind])
        )
        for kind, found in ratios.items()
    ]


def latencies_around(kind: str, server: Nbdzram, directory: Path) -> tuple[list[float], list[float]]:
    """Microseconds of single requests, by fio's own log: those during the run, those without."""
    window: list[float] = []

    def work() -> None:
        # Asked for in this process: a command's start-up would compete for the processors inside the window.
        with ControlClient(server.control) as control:
            time.sleep(SETTLE_SECONDS)
            started = time.time()
            control.call("run", kind=kind)
            window.extend([started, time.time()])

    working = Thread(target=work)
    working.start()
    fio(
        server,
        *("--rw=randrw", "--bs=4k", "--iodepth=1", "--size=1g"),
        *("--time_based", f"--runtime={SETTLE_SECONDS * 3}"),
        *(f"--write_lat_log={directory}/{kind}", "--log_unix_epoch=1", "--disable_slat=1", "--disable_clat=1"),
    )
    working.join()
    start, end = window
    inside: list[float] = []
    outside: list[float] = []
    for line in (directory / f"{kind}_lat.1.log").read_text().splitlines():
        milliseconds, nanoseconds = (int(word) for word in line.split(",")[:2])
        (inside if start <= milliseconds / 1000 <= end else outside).append(nanoseconds / 1000)
    assert len(inside) > 100, f"{kind} of {end - start:.3f} s left too few requests to judge: {len(inside)}"
    return inside, outside


def measure_hostility(directory: Path, effort: Effort) -> list[Figure]:
    """p99 at 4 KiB, depth 1, of a client beside a crowd that means harm, and of the same client alone."""
    figures = []
    pki = Pki(directory / "hostile-pki")
    pki.issue("localhost", file="server")
    place = directory / "hostile"
    place.mkdir()
    arguments = (*strangers.many_exports(place), *tls_arguments(pki, mode="on", client_ca=False))
    with Nbdzram(place, {"disk": GIB}, arguments=arguments, metrics=True) as server, many_descriptors():
        fill(server, SPEED_BYTES)
        load = partial(timed_load, server, "randrw", SPEED_BYTES, seconds=effort.seconds, depth=1)
        for what, attack in ATTACKS.items():
            ratios, details = [], []
            for _ in range(effort.rounds):
                alone = load().p99_us
                with attack(server):
                    beside = load().p99_us
                ratios.append(beside / alone)  # of neighbours in time: what else the machine does is in both
                details.append(f"{beside:.0f}/{alone:.0f} us")
            figures.append(Figure(f"p99 at depth 1, {what} / alone", median(ratios), 2.0, False, ", ".join(details)))
    return figures


@contextmanager
def stalled(server: Nbdzram) -> Iterator[None]:
    """30 clients ask for 64 times 32 MiB and read nothing, 64 stop in the middle of writing 32 MiB."""
    content = bytes(range(256)) * 4096
    with Crowd() as crowd:
        crowd.attach(server, 94)
        halves = [half_a_write(SPEED_BYTES + n * (LONG // 4), LONG, content) for n in range(64)]
        crowd.press([*[reads(64, LONG)] * 30, *halves])
        yield


@contextmanager
def restless(server: Nbdzram) -> Iterator[None]:
    """20 times a second four clients ask for 64 times 32 MiB each, and break their connections at once."""
    done = Event()

    def harass() -> None:
        # Who attacks has a machine of their own: here they get what the server and its client leave.
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)
        with Crowd() as crowd:
            while not done.wait(HARASS_SECONDS):
                crowd.attach(server, 4, tcp=True)
                crowd.press([reads(64, LONG)] * 4)
                crowd.disperse(reset=True)

    harassing = Thread(target=harass)
    harassing.start()
    try:
        yield
    finally:
        done.set()
        harassing.join()


HARASS_SECONDS = 0.05
ATTACKS: dict[str, strangers.Attack] = {
    "beside stalled clients": stalled,
    "beside clients that reset": restless,
    **strangers.ATTACKS,
    **onlookers.ATTACKS,
}


def measure_memory(directory: Path, _: Effort) -> list[Figure]:
    """What a gigabyte costs beyond its compressed bytes, and what is left to fold."""
    figures = []
    with start_peer("nbdzram", directory / "resident", GIB) as server:
        assert isinstance(server, Nbdzram)
        fill(server, GIB)
        beyond = (server.resident_bytes() - server.mm_stat()[2]) / MIB
        limit = 64 + 32 * (GIB // BLOCK) / MIB
        figures.append(Figure("resident less mem_used_total, MiB, 1 GiB stored", beyond, limit, False, ""))
    with Nbdzram(directory / "resident", {"disk": GIB}, arguments=["--threads", "16"], metrics=True) as server:
        fill(server, GIB)
        more = (server.resident_bytes() - server.mm_stat()[2]) / MIB - beyond
        figures.append(Figure("the same with 16 I/O threads, MiB more", more, 8, False, ""))
    image = ext4_gibibyte()
    with start_peer("nbdzram", directory / "density", GIB) as server:
        assert isinstance(server, Nbdzram)
        copy_seconds(image, server.uri())
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


def measure_scrape(directory: Path, effort: Effort) -> list[Figure]:
    """What looking at a hundred exports costs the server, and for how long nobody else is served meanwhile."""
    places = [directory / f"scrape-{number}" for number in range(effort.rounds)]
    for place in places:
        place.mkdir()
    figures = []
    for path, required in (("/metrics", 20.0), ("/status.json", 20.0)):
        costs = [scrape.processor_ms(place, path) for place in places]
        figures.append(Figure(f"{path} of 100 exports, processor time, ms", median(costs), required, False, ""))
    holds = [scrape.longest_holds_ms(place) for place in places]
    for what in holds[0]:
        longest = median(hold[what] for hold in holds)
        figures.append(Figure(f"{what} of 100 exports, loop held, ms", longest, 4.0, False, ""))
    return figures


def measure_holds(_: Path, effort: Effort) -> list[Figure]:
    """How long anybody keeps a pool's lock or a disk's stripe: processor time."""
    figures = []
    for case, measure in holds.CASES.items():
        nothing = min(holds.of_nothing() for _ in range(effort.rounds)) / 1000
        for kind, (held_ns, function) in holds.longest_of(measure, effort.rounds).items():
            detail = f"{holds.where(function)}; a hold that does nothing {nothing:.0f} us"
            figures.append(Figure(f"longest hold of a {kind}'s lock, {case}, us", held_ns / 1000, 100.0, False, detail))
    return figures


MEASUREMENTS: dict[str, Callable[[Path, Effort], list[Figure]]] = {
    "speed": speed.measure_speed,
    "copy": measure_copy,
    "crowd": speed.measure_crowd,
    "tls": speed.measure_tls,
    "latency": measure_latency,
    "hostile": measure_hostility,
    "holds": measure_holds,
    "memory": measure_memory,
    "scrape": measure_scrape,
    "streams": lambda directory, effort: lasting.measure_streams(directory, effort.rounds),
    "checkpoints": lambda directory, effort: lasting.measure_checkpoints(directory, effort.rounds),
    "verification": lambda directory, effort: lasting.measure_verification(directory, effort.rounds, effort.seconds),
    "starting": lambda _, effort: starting.measure_starting(effort.rounds),
    "pauses": lambda _, effort: pauses.measure_pauses(effort.rounds),
    "caged": lambda directory, effort: caged.measure_caged(directory, effort.rounds, effort.seconds),
}


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
