"""What it costs that nothing is lost: streams, checkpoints beside a client, and reads that are verified.

python -m tests.bench.acceptance streams checkpoints verification
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.figures import Figure
from tests.bench.measure import BLOCK, MIB, fill, fio, median, timed_load
from tests.support.server import Nbdzram

GIB = 1 << 30
CLONES = 8
CHANGED_SHARE = 100  # one block of so many
CHECKPOINT_SECONDS = 10
LOAD_BYTES = 512 * MIB
WINDOW_MS = 10  # of fio's log: the longest request that ended in each


def measure_streams(directory: Path, rounds: int) -> list[Figure]:
    """1 GiB of folded clones to a file and from there, by processor time of the server."""
    size, rates_out, rates_in, increments = [], [], [], []
    details, times = [], []
    for number in range(rounds):
        place = directory / f"streams-{number}"
        (place / "here").mkdir(parents=True)
        (place / "there").mkdir()
        with Nbdzram(place / "here", {"golden": GIB}) as here, Nbdzram(place / "there", {}) as there:
            _fill_clones(here)
            before = here.cpu_seconds()
            report = _send(here, place / "full", "--all")
            sent_cpu = here.cpu_seconds() - before
            used = here.mm_stat()[2]
            size.append(report["stream_bytes"] / used)
            rates_out.append(report["object_bytes"] / sent_cpu / 1e6)
            before = there.cpu_seconds()
            _receive(there, place / "full")
            received_cpu = there.cpu_seconds() - before
            rates_in.append(report["object_bytes"] / received_cpu / 1e6)
            details.append(f"{report['stream_bytes'] / MIB:.0f}/{used / MIB:.0f} MiB")
            before = here.cpu_seconds()
            _send(here, place / "whole", "golden")
            whole_cpu = here.cpu_seconds() - before
            increment, increment_cpu = _increment(here, place)
            increments.append(increment)
            times.append(f"{increment_cpu / whole_cpu:.3f}")
    said = ", ".join(details)
    return [
        Figure("stream of 1 GiB of folded clones / mem_used", median(size), 1.02, False, said),
        Figure("send, MB of stored bytes a processor's second", median(rates_out), 400.0, True, ""),
        Figure("receive, MB of stored bytes a processor's second", median(rates_in), 200.0, True, ""),
        Figure(
            "incremental after 1 % / changed bytes as stored",
            median(increments),
            1.05,
            False,
            f"{', '.join(times)} of the processor time of the whole",
        ),
    ]


def _fill_clones(server: Nbdzram) -> None:
    _fill(server, "golden")
    server.fold()
    server.compact()
    for number in range(CLONES):
        server.command_line("clone", "golden", f"vm{number}")


def _fill(server: Nbdzram, export: str) -> None:
    """Half-compressible blocks, of which a quarter have a twin."""
    rolls = random.Random(7)
    with server.client(export) as client:
        for start in range(0, GIB, MIB):
            client.write(start, b"".join(_block(rolls) for _ in range(MIB // BLOCK)))


def _block(rolls: random.Random) -> bytes:
    if rolls.random() < 0.25:
        rolls = random.Random(rolls.randrange(20_000))
    return rolls.randbytes(BLOCK // 2).ljust(BLOCK, b"\0")


def _increment(server: Nbdzram, place: Path) -> tuple[float, float]:
    """Its bytes by those that changed, and what it took of a processor."""
    rolls = random.Random(8)
    server.command_line("snapshot", "golden", "golden@monday")
    before = server.mm_stat()[1]
    with server.client("golden") as client:
        for block in rolls.sample(range(GIB // BLOCK), GIB // BLOCK // CHANGED_SHARE):
            client.write(block * BLOCK, rolls.randbytes(BLOCK // 2).ljust(BLOCK, b"\0"))
    changed = server.mm_stat()[1] - before
    server.command_line("snapshot", "golden", "golden@tuesday")
    before_cpu = server.cpu_seconds()
    report = _send(server, place / "later", "golden@tuesday", "--since", "monday")
    return float(report["stream_bytes"] / changed), server.cpu_seconds() - before_cpu


def _send(server: Nbdzram, path: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "nbdzram", "send", *words, "--json", "--control", str(server.control)]
    with path.open("wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=True, env=server.environment())
    report: dict[str, Any] = json.loads(done.stderr)
    return report


def _receive(server: Nbdzram, path: Path) -> None:
    command = [sys.executable, "-m", "nbdzram", "receive", "--control", str(server.control)]
    with path.open("rb") as source:
        subprocess.run(command, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
                       env=server.environment())  # fmt: skip


# -- checkpoints -----------------------------------------------------------------------------------------------------


def measure_checkpoints(directory: Path, rounds: int) -> list[Figure]:
    """Random 4 KiB writes at depth 32 beside a checkpoint every 10 s, and without; two lie within each run."""
    ratios, tails, stalls, alone, details = [], [], [], [], []
    for number in range(rounds):
        plain = _loaded(directory / f"plain-{number}", ())
        kept = directory / f"checkpoints-{number}"
        beside = _loaded(kept, ("--checkpoint", str(kept / "kept"), "--checkpoint-interval", f"{CHECKPOINT_SECONDS}s"))
        ratios.append(beside["iops"] / plain["iops"])
        tails.append(beside["p99_us"] / plain["p99_us"])
        stalls.append(beside["longest_ms"])
        alone.append(plain["longest_ms"])
        details.append(f"{beside['iops'] / 1000:.0f}k/{plain['iops'] / 1000:.0f}k")
    said = f"without {', '.join(f'{longest:.0f}' for longest in alone)}"
    return [
        Figure("4 KiB writes, a checkpoint every 10 s / none", median(ratios), 0.9, True, ", ".join(details)),
        Figure("p99, a checkpoint every 10 s / none", median(tails), 1.5, False, ""),
        Figure("longest request beside checkpoints, ms", median(stalls), 50.0, False, said),
    ]


def _loaded(place: Path, arguments: tuple[str, ...]) -> dict[str, float]:
    place.mkdir()
    with Nbdzram(place, {"disk": LOAD_BYTES}, arguments=arguments) as server:
        fill(server, LOAD_BYTES)
        report = fio(
            server,
            *("--rw=randwrite", "--bs=4k", "--iodepth=32", f"--size={LOAD_BYTES}"),
            *("--time_based", f"--runtime={CHECKPOINT_SECONDS * 5 // 2}", "--disable_slat=1", "--disable_clat=0"),
            *(
                f"--write_lat_log={place}/load",
                "--log_unix_epoch=1",
                f"--log_avg_msec={WINDOW_MS}",
                "--log_max_value=1",
            ),
        )["write"]
    _print_stalls(place)
    return {
        "iops": report["iops"],
        "p99_us": report["clat_ns"]["percentile"]["99.000000"] / 1000,
        "longest_ms": report["clat_ns"]["max"] / 1e6,
    }


def _print_stalls(place: Path) -> None:
    """The longest requests, and how long after a checkpoint's file had its name they ended: where to look."""
    made = (
        sorted(path.stat().st_mtime for path in (place / "kept").glob("*.stream")) if (place / "kept").exists() else []
    )
    for ended, longest_ms in sorted(_windows(place), key=lambda one: -one[1])[:5]:
        behind = min((ended - at for at in made), key=abs, default=None)
        where = "" if behind is None else f", {behind * 1000:+.0f} ms from a checkpoint's file"
        print(f"  {longest_ms:.1f} ms{where}")


def _windows(place: Path) -> Iterator[tuple[float, float]]:
    for line in (place / "load_lat.1.log").read_text().splitlines():
        milliseconds, nanoseconds = (int(word) for word in line.split(",")[:2])
        yield milliseconds / 1000, nanoseconds / 1e6


# -- verification ----------------------------------------------------------------------------------------------------


def measure_verification(directory: Path, rounds: int, seconds: int) -> list[Figure]:
    """4 KiB random reads of a pool that is verified, and of one that says `verify = false`."""
    places = {}
    for name, verify in (("verified", "true"), ("unverified", "false")):
        places[name] = directory / name
        places[name].mkdir()
        (places[name] / "config.toml").write_text(f"[pools.default]\nverify = {verify}\n")
    with (
        Nbdzram(
            places["verified"], {"disk": LOAD_BYTES}, arguments=("--config", str(places["verified"] / "config.toml"))
        ) as one,
        Nbdzram(
            places["unverified"],
            {"disk": LOAD_BYTES},
            arguments=("--config", str(places["unverified"] / "config.toml")),
        ) as other,
    ):
        ratios, costs = [], []
        for server in (one, other):
            fill(server, LOAD_BYTES)
        for _ in range(rounds):
            with_it, without = (timed_load(server, "randread", LOAD_BYTES, seconds=seconds) for server in (one, other))
            ratios.append(with_it.iops / without.iops)
            costs.append((with_it.cpu_us, without.cpu_us))
    verified, unverified = (median(cost[place] for cost in costs) for place in (0, 1))
    detail = f"{verified:.2f} and {unverified:.2f} us of processor a request"
    return [Figure("4 KiB reads verified / not, depth 32", median(ratios), 0.95, True, detail)]
