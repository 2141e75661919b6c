"""How a server is loaded and measured from outside: fio's nbd engine, nbdcopy, /proc."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tests.support.programs import require_program, run
from tests.support.reach import TrustingUser
from tests.support.server import ServerProcess

MIB = 1 << 20
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Load:
    """One run of fio against one server."""

    iops: float
    p50_us: float  # this and the next: the worse of reads and writes
    p99_us: float
    cpu_us: float  # processor time of the server's process, a request
    client_busy: float  # share of the time for which a thread of the client had a processor; 1: it has no time left


def fio(server: ServerProcess, *options: str, tls: TrustingUser | None = None) -> dict[str, Any]:
    """Run one job with fio's nbd engine on half-compressible data; returns fio's own report of it.

    Over the unix socket, or as a user who trusts the server over TLS on TCP.
    """
    program = require_program("fio", package="fio")
    uri = server.uri() if tls is None else f"nbds://127.0.0.1:{server.port}/disk"
    printed = run(
        [
            *(program, "--name=load", "--ioengine=nbd", f"--uri={uri}"),
            *("--refill_buffers", "--buffer_compress_percentage=50"),
            *("--randrepeat=0", "--norandommap", "--thread", "--output-format=json", *options),
        ],
        environment=tls.environment() if tls else None,
        user=tls.user if tls else None,
        directory=tls.home if tls else None,
    )
    (job,) = json.loads(printed[printed.index("{") :])["jobs"]  # remarks may stand before it
    assert job["error"] == 0
    report: dict[str, Any] = job
    return report


def timed_load(
    server: ServerProcess,
    kind: str,
    size: int,
    *,
    seconds: int,
    block: str = "4k",
    depth: int = 32,
    connections: int = 1,
    tls: TrustingUser | None = None,
) -> Load:
    """kind: fio's, as randread, write or randrw (half and half), over the first `size` bytes; `depth` a connection."""
    before = server.cpu_seconds()
    job = fio(
        server,
        *(f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", f"--size={size}"),
        *(f"--numjobs={connections}", "--group_reporting", "--time_based", f"--runtime={seconds}"),
        tls=tls,
    )
    spent = server.cpu_seconds() - before
    directions = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    p50_us, p99_us = (
        max(direction["clat_ns"]["percentile"][percent] for direction in directions) / 1000
        for percent in ("50.000000", "99.000000")
    )
    return Load(
        iops=sum(direction["iops"] for direction in directions),
        p50_us=p50_us,
        p99_us=p99_us,
        cpu_us=spent / sum(direction["total_ios"] for direction in directions) * 1e6,
        client_busy=(job["usr_cpu"] + job["sys_cpu"]) / 100,
    )


def median_load(loads: Sequence[Load]) -> Load:
    """Of several runs, each figure's median."""
    figures = ([getattr(load, field.name) for load in loads] for field in fields(Load))
    return Load(*map(median, figures))


def fill(server: ServerProcess, size: int, *options: str, tls: TrustingUser | None = None) -> None:
    """Store something in every block of the first `size` bytes."""
    fio(server, "--rw=write", "--bs=256k", "--iodepth=8", f"--size={size}", *options, tls=tls)


def copy_seconds(source: str | Path, target: str | Path) -> float:
    """How long nbdcopy takes from a file or URI to another."""
    nbdcopy = require_program("nbdcopy", package="libnbd-bin")
    started = time.monotonic()
    run([nbdcopy, "--flush", source, target])
    return time.monotonic() - started


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
