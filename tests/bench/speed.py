"""How fast, and for how much of a processor, beside nbdkit: the figures of `make bench` that a client feels.

A processor's time is told for the server's process, a request. What compression and verification alone cost on the same
blocks is measured in this process, so that what is left of ours can be compared with a server that only copies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread

from nbdzram.engine.codec import compress_lz4, fingerprint_of
from tests.bench.content import ext4_gibibyte
from tests.bench.figures import Figure
from tests.bench.floor import Floor
from tests.bench.measure import BLOCK, MIB, Load, copy_seconds, fill, fio, median, median_load, timed_load
from tests.support.pki import Pki
from tests.support.reach import tls_arguments, trusting_user
from tests.support.server import Nbdkit, Nbdzram, ServerProcess, free_port

GIB = 1 << 30
SPEED_BYTES = 512 * MIB
LARGE = 256 << 10  # of a large request
PEERS = ("nbdzram", "nbdkit-memory", "nbdkit-zstd")
FLOOR = "floor"
CROWD_CONNECTIONS, CROWD_DEPTH = 16, 32


@dataclass(frozen=True, slots=True)
class Effort:
    rounds: int
    seconds: int


def start_peer(name: str, directory: Path, size: int) -> ServerProcess:
    directory.mkdir()
    match name:
        case "nbdzram":
            return Nbdzram(directory, {"disk": size}, metrics=True)
        case "nbdkit-memory":
            return Nbdkit(directory, str(size))
        case "nbdkit-zstd":
            return Nbdkit(directory, str(size), allocator="zstd")
        case "floor":
            return Floor(directory, size)
    raise ValueError(name)


def alternate(
    peers: Mapping[str, ServerProcess], load: Callable[[ServerProcess], Load], effort: Effort
) -> tuple[dict[str, Load], str]:
    """The same load on each in turn, and a line that tells of each."""
    loads: dict[str, list[Load]] = {name: [] for name in peers}
    for _ in range(effort.rounds):
        for name, peer in peers.items():
            loads[name].append(load(peer))
    found = {name: median_load(loads[name]) for name in peers}
    return found, ", ".join(
        f"{name} {spent.iops / 1000:.1f}k at {spent.cpu_us:.1f} us (client {spent.client_busy:.2f})"
        for name, spent in found.items()
    )


# Reads alone cannot be four times nbdkit-zstd's: uncompressed nbdkit is 1.5 times as fast there, and then fio itself is
# the limit. So the two are compared where both have work to do.
REQUIRED_SPEED = {
    "randwrite": {"nbdkit-memory": 1.2, "nbdkit-zstd": 4.0},
    "randread": {"nbdkit-memory": 1.0},
    "randrw": {"nbdkit-memory": 1.0, "nbdkit-zstd": 4.0},
}
REQUIRED_PROCESSOR = {"randwrite": 0.7, "randread": 0.5}
# Against a server that only copies. It has the same socket to serve, so it also tells which of the ratios above can be
# reached at all on a machine where that is most of the time.
READ_OF_FLOOR = 2.0
WRITE_BESIDE_FLOOR_US = 1.0  # beside what compression and the fingerprint take alone


def measure_speed(directory: Path, effort: Effort) -> list[Figure]:
    """4 KiB random requests on one connection, unix socket: at queue depth 32, and one at a time."""
    peers = {name: start_peer(name, directory / f"speed-{name}", SPEED_BYTES) for name in (*PEERS, FLOOR)}
    figures = []
    try:
        for peer in peers.values():
            fill(peer, SPEED_BYTES)
        alone = alone_us(half_compressible() for _ in range(2000))
        for kind, required in REQUIRED_SPEED.items():
            load = partial(timed_load, kind=kind, size=SPEED_BYTES, seconds=effort.seconds)
            found, detail = alternate(peers, load, effort)
            for name, least in required.items():
                ratio = found["nbdzram"].iops / found[name].iops
                figures.append(Figure(f"4 KiB {kind}, depth 32 / {name}", ratio, least, True, detail))
            if kind in REQUIRED_PROCESSOR:
                ratio, most = found["nbdzram"].cpu_us / found["nbdkit-memory"].cpu_us, REQUIRED_PROCESSOR[kind]
                figures.append(Figure(f"the same, processor time / {PEERS[1]}", ratio, most, False, detail))
                figures.append(compare_with_floor(kind, found, alone))
        for name in (PEERS[2], FLOOR):
            peers.pop(name).stop()
        for kind in REQUIRED_PROCESSOR:
            load = partial(timed_load, kind=kind, size=SPEED_BYTES, seconds=effort.seconds, depth=1)
            found, _ = alternate(peers, load, effort)
            ours, theirs = (found[name] for name in PEERS[:2])
            for what, one, other in (("median", ours.p50_us, theirs.p50_us), ("p99", ours.p99_us, theirs.p99_us)):
                detail = f"{one:.1f}/{other:.1f} us"
                figures.append(Figure(f"4 KiB {kind}, depth 1, {what} / {PEERS[1]}", one / other, 1.0, False, detail))
    finally:
        for peer in peers.values():
            peer.stop()
    return figures


def compare_with_floor(kind: str, found: Mapping[str, Load], alone: float) -> Figure:
    """Processor time a request. `alone`: of compression and the fingerprint, microseconds a block."""
    ours, floor, other = (found[name].cpu_us for name in (PEERS[0], FLOOR, PEERS[1]))
    detail = f"{ours:.1f}/{floor:.1f} us, the floor / {PEERS[1]} {floor / other:.2f}"
    if kind == "randread":
        return Figure("the same, processor time / the floor", ours / floor, READ_OF_FLOOR, False, detail)
    most = floor + alone + WRITE_BESIDE_FLOOR_US
    detail += f", compressing alone {alone:.2f} us"
    return Figure("the same, / (the floor + compressing alone + 1 us)", ours / most, 1.0, False, detail)


def measure_crowd(directory: Path, effort: Effort) -> list[Figure]:
    """p99 of a client that asks for one block at a time, beside others that have 512 requests under way."""
    tails: dict[str, list[float]] = {}
    for number in range(effort.rounds):
        for name in PEERS[:2]:
            with start_peer(name, directory / f"crowd-{number}-{name}", SPEED_BYTES) as server:
                fill(server, SPEED_BYTES)
                with crowded(server, effort.seconds):
                    load = timed_load(server, "randread", SPEED_BYTES, seconds=effort.seconds, depth=1)
                tails.setdefault(name, []).append(load.p99_us)
    ours, theirs = (median(tails[name]) for name in PEERS[:2])
    what = f"p99 at depth 1, beside {CROWD_CONNECTIONS} x {CROWD_DEPTH} / nbdkit's"
    return [Figure(what, ours / theirs, 1.0, False, f"{ours:.0f}/{theirs:.0f} us")]


@contextmanager
def crowded(server: ServerProcess, seconds: int) -> Iterator[None]:
    """Others are busy at it, from before the block begins until it is over."""
    over = Event()

    def crowd() -> None:
        while not over.is_set():
            fio(
                server,
                *("--rw=randrw", "--bs=4k", f"--iodepth={CROWD_DEPTH}", f"--numjobs={CROWD_CONNECTIONS}"),
                *(f"--size={SPEED_BYTES}", "--group_reporting", "--time_based", f"--runtime={seconds + 2}"),
            )

    working = Thread(target=crowd)
    working.start()
    try:
        time.sleep(1)  # fio has connected; what it has not is a little less of a crowd
        yield
    finally:
        over.set()
        working.join()


@dataclass(frozen=True, slots=True)
class TlsLoad:
    kind: str
    block: str
    depth: int
    required: float  # of nbdkit-memory's rate; for what we compress, of its processor time and that of compressing
    compresses: bool = False


TLS_LOADS = {
    "4 KiB randread, depth 32": TlsLoad("randread", "4k", 32, 2.5),
    "4 KiB randwrite, depth 32": TlsLoad("randwrite", "4k", 32, 1.2),
    "256 KiB read, depth 8": TlsLoad("read", "256k", 8, 1.0),
    "256 KiB write, depth 8": TlsLoad("write", "256k", 8, 1.1, compresses=True),
}
COPY_PROCESSOR = 1.1


def measure_tls(directory: Path, effort: Effort) -> list[Figure]:
    """The same over TLS on TCP. nbdkit twice: plain memory, which only copies, and its compressing allocator."""
    pki = Pki(directory / "pki")
    files = pki.client_directory(directory / "client", None)
    pki.issue("localhost", file="server")
    peers: dict[str, ServerProcess] = {}
    figures = []
    try:
        for name in PEERS:
            (directory / name).mkdir()
        peers["nbdzram"] = Nbdzram(
            directory / "nbdzram", {"disk": SPEED_BYTES}, arguments=tls_arguments(pki, mode="require", client_ca=False)
        )
        for name, allocator in (("nbdkit-memory", "sparse"), ("nbdkit-zstd", "zstd")):
            peers[name] = Nbdkit(
                directory / name,
                str(SPEED_BYTES),
                allocator=allocator,
                port=free_port(),
                arguments=["--tls=require", f"--tls-certificates={pki.directory}"],
            )
        alone = alone_us(half_compressible() for _ in range(2000)) * (LARGE // BLOCK)
        with trusting_user(files) as user:
            for peer in peers.values():
                fill(peer, SPEED_BYTES, tls=user)
            for what, asked in TLS_LOADS.items():
                load = partial(
                    timed_load,
                    kind=asked.kind,
                    size=SPEED_BYTES,
                    block=asked.block,
                    depth=asked.depth,
                    seconds=effort.seconds,
                    tls=user,
                )
                found, detail = alternate(peers, load, effort)
                rates = {name: found["nbdzram"].iops / found[name].iops for name in PEERS[1:]}
                if asked.compresses:
                    ratio = found["nbdzram"].cpu_us / (found["nbdkit-memory"].cpu_us + alone)
                    detail += f"; compressing alone {alone:.0f} us"
                    figures.append(Figure(f"TLS, {what}, processor time", ratio, asked.required, False, detail))
                else:
                    figures.append(Figure(f"TLS, {what} / {PEERS[1]}", rates[PEERS[1]], asked.required, True, detail))
                figures.append(Figure(f"TLS, {what} / {PEERS[2]}", rates[PEERS[2]], 1.0, True, detail))
        figures += compare_tls_copies(peers, directory, files, effort)
    finally:
        for peer in peers.values():
            peer.stop()
    return figures


def half_compressible() -> bytes:
    """A block as fio makes it: half of each 512 bytes is random, the rest zeroes."""
    return b"".join(os.urandom(256) + bytes(256) for _ in range(BLOCK // 512))


def alone_us(blocks: Iterator[bytes]) -> float:
    """Processor time of LZ4 and of the fingerprint alone, a block: the quickest of three rounds."""
    content = list(blocks)

    def once() -> float:
        started = time.thread_time()
        for block in content:
            compress_lz4(block)
            fingerprint_of(block)
        return (time.thread_time() - started) / len(content) * 1e6

    return min(once() for _ in range(3))


def compare_tls_copies(
    peers: Mapping[str, ServerProcess], directory: Path, client_files: Path, effort: Effort
) -> list[Figure]:
    """Half a gigabyte of the ext4 image in and out with nbdcopy's connections, over what was there."""
    part = directory / "part"
    with ext4_gibibyte().open("rb") as image:
        content = image.read(SPEED_BYTES)
    part.write_bytes(content)
    ways: dict[str, Callable[[str], tuple[str | Path, str | Path]]] = {
        "in": lambda uri: (part, uri),
        "out": lambda uri: (uri, "null:"),
    }
    figures = []
    for way, ends in ways.items():
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        spent: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(effort.rounds):
            for name, peer in peers.items():
                before = peer.cpu_seconds()
                uri = f"nbds://127.0.0.1:{peer.port}/disk?tls-certificates={client_files}"
                seconds[name].append(copy_seconds(*ends(uri)))
                spent[name].append(peer.cpu_seconds() - before)
        times = {name: median(seconds[name]) for name in peers}
        detail = ", ".join(f"{name} {SPEED_BYTES / MIB / times[name]:.0f} MiB/s" for name in peers)
        if way == "in":
            stored = [content[at : at + BLOCK] for at in range(0, SPEED_BYTES, BLOCK)]
            stored = [block for block in stored if any(block)]
            alone = alone_us(iter(stored[:: max(1, len(stored) // 4000)])) * len(stored) / 1e6
            ratio = median(spent["nbdzram"]) / (median(spent["nbdkit-memory"]) + alone)
            said = f"{detail}; {median(spent['nbdzram']):.2f} s, {median(spent['nbdkit-memory']):.2f} s"
            said += f", compressing alone {alone:.2f} s"
            figures.append(Figure("TLS, ext4 image in, nbdcopy, processor time", ratio, COPY_PROCESSOR, False, said))
        for name in PEERS[1:] if way == "out" else PEERS[2:]:
            ratio = times[name] / times["nbdzram"]
            figures.append(Figure(f"TLS, ext4 image {way}, nbdcopy / {name}", ratio, 1.0, True, detail))
    return figures
