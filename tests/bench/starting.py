"""How long a start takes with more and more stored: the first READ that is answered, and what opening costs of it.

python -m tests.bench.acceptance starting          # 8 GiB in files that are memory: 10 GiB of it must be free

Each server keeps its disk in a state directory on /dev/shm, is filled with blocks of which half compresses, stopped,
and started again. A client asks for a block from the moment on that the process begins: what it waits, less what it
waits of a server that has nothing, is what the content costs. The processor time is the whole process's until then.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import Figure
from tests.bench.measure import BLOCK, MIB, fill, median
from tests.support.server import Nbdzram

SIZES = (0.25, 1, 2, 4, 8)  # GiB as they are stored
GIB = 1 << 30
STORED_SHARE = 0.53  # of what `fill` writes
MEMORY = Path("/dev/shm")
LOOK_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Start:
    """One start: until a READ was answered."""

    seconds: float
    cpu_seconds: float


def measure_starting(rounds: int) -> list[Figure]:
    found: dict[float, list[Start]] = {}
    stored: dict[float, float] = {}
    for size in (0, *SIZES):
        with tempfile.TemporaryDirectory(prefix="nbdzram-bench-", dir=MEMORY) as directory:
            place = Path(directory)
            exports = {"disk": int(16 * GIB)}
            arguments = ("--state-dir", str(place / "state"))
            with Nbdzram(place, exports, arguments=arguments) as server:
                if size:
                    fill(server, int(size / STORED_SHARE * GIB) // MIB * MIB)
                stored[size] = server.mm_stat()[2] / GIB
            found[size] = [_start(server) for _ in range(rounds)]
        waited, spent = _medians(found[size])
        print(
            f"  {stored[size]:5.2f} GiB stored: first READ after {waited:.3f} s, {spent:.3f} s of processor", flush=True
        )
    (nothing, idle), (least, _), (most, busy) = (_medians(found[size]) for size in (0, SIZES[0], SIZES[-1]))
    detail = f"{most:.2f}/{least:.2f} s; with nothing stored {nothing:.2f}"
    return [
        Figure("first READ after a start, 8 GiB / 0.25 GiB stored", most / least, 1.5, False, detail),
        Figure("opening, s a GiB stored", (most - nothing) / stored[SIZES[-1]], 0.1, False, ""),
        Figure("opening, s of processor a GiB stored", (busy - idle) / stored[SIZES[-1]], 0.1, False, ""),
    ]


def _medians(starts: list[Start]) -> tuple[float, float]:
    return median(start.seconds for start in starts), median(start.cpu_seconds for start in starts)


def _start(server: Nbdzram) -> Start:
    """Start what had ended once more, until a client has read a block of it."""
    server.unix_path.unlink(missing_ok=True)
    began = time.monotonic()
    with server.log_path.open("wb") as log:
        process = server.process = subprocess.Popen(
            server.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=server.environment()
        )
    while not _has_answered(server):
        assert process.poll() is None, server.log
        time.sleep(LOOK_SECONDS)
    found = Start(time.monotonic() - began, server.cpu_seconds())
    server.stop()
    return found


def _has_answered(server: Nbdzram) -> bool:
    try:
        with server.client() as client:
            client.read(0, BLOCK)
    except OSError:  # no socket yet, or nobody behind it
        return False
    return True
