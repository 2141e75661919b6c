"""How a server is loaded and measured from outside: fio's nbd engine, nbdcopy, /proc."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import require_program, run
from tests.support.server import ServerProcess

MIB = 1 << 20
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Load:
    """One run of fio against one server."""

    iops: float
    p99_us: float  # the worse of reads and writes
    cpu_us: float  # processor time of the server's process, a request


def fio(server: ServerProcess, directory: Path, *options: str) -> dict[str, Any]:
    """Run one job with fio's nbd engine on half-compressible data; returns fio's own report of it."""
    program = require_program("fio", package="fio")
    output = directory / "fio.json"
    run(
        [
            *(program, "--name=load", "--ioengine=nbd", f"--uri={server.uri()}"),
            *("--refill_buffers", "--buffer_compress_percentage=50"),
            *("--randrepeat=0", "--norandommap", "--thread"),
            *("--output-format=json", f"--output={output}", *options),
        ]
    )
    printed = output.read_text()
    (job,) = json.loads(printed[printed.index("{") :])["jobs"]  # remarks may stand before it
    assert job["error"] == 0
    report: dict[str, Any] = job
    return report


def random_load(server: ServerProcess, directory: Path, kind: str, size: int, *, depth: int, seconds: int) -> Load:
    """kind: randread, randwrite or randrw (half and half), 4 KiB, over the first `size` bytes."""
    before = server.cpu_seconds()
    job = fio(
        server,
        directory,
        *(f"--rw={kind}", "--bs=4k", f"--iodepth={depth}", f"--size={size}"),
        *("--time_based", f"--runtime={seconds}"),
    )
    spent = server.cpu_seconds() - before
    directions = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    return Load(
        iops=sum(direction["iops"] for direction in directions),
        p99_us=max(direction["clat_ns"]["percentile"]["99.000000"] for direction in directions) / 1000,
        cpu_us=spent / sum(direction["total_ios"] for direction in directions) * 1e6,
    )


def fill(server: ServerProcess, directory: Path, size: int, *options: str) -> None:
    """Store something in every block of the first `size` bytes."""
    fio(server, directory, "--rw=write", "--bs=256k", "--iodepth=8", f"--size={size}", *options)


def copy_seconds(server: ServerProcess, image: Path) -> float:
    """How long nbdcopy takes to bring a whole file in."""
    nbdcopy = require_program("nbdcopy", package="libnbd-bin")
    started = time.monotonic()
    run([nbdcopy, "--flush", image, server.uri()])
    return time.monotonic() - started


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
