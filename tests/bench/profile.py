"""`make profile`: where the server's processor time goes, function by function, kernel included, under a client's load.

python -m tests.bench.profile [--seconds N] [--top N] [LOAD...]     LOAD: as in LOADS; all unless said

By sampling (perf), so it changes nothing of what it looks at; where a machine has no hardware counters, by its clock.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import MIB, fill, timed_load
from tests.support.programs import require_program, run
from tests.support.server import Nbdzram

SIZE = 512 * MIB
SAMPLES_A_SECOND = 2000
LOADS = {
    "read": ("randread", "4k", 32),
    "write": ("randwrite", "4k", 32),
    "read-alone": ("randread", "4k", 1),
    "write-alone": ("randwrite", "4k", 1),
    "read-large": ("randread", "256k", 8),
    "write-large": ("randwrite", "256k", 8),
}
"""fio's kind, bytes a request, and how many are under way."""

ROW = re.compile(r"\s*([\d.]+)%\s+\S+\s+(\S+)\s+\[(.)\]\s+(\S+)")
"""Share, file, k for the kernel, and function, as `perf report` prints them."""


def record(perf: str, server: Nbdzram, samples: Path, load: tuple[str, str, int], seconds: int) -> str:
    """Sample the server under a load; what a request took."""
    kind, block, depth = load
    where = ["-e", "cpu-clock", "-F", str(SAMPLES_A_SECOND), "-o", samples, "-p", str(server.process.pid)]
    sampler = subprocess.Popen([perf, "record", "-q", *map(str, where)], stderr=subprocess.DEVNULL)
    try:
        found = timed_load(server, kind, SIZE, seconds=seconds, block=block, depth=depth)
    finally:
        sampler.send_signal(signal.SIGINT)
        sampler.wait()
    return f"{found.iops / 1000:.1f}k a second, {found.cpu_us:.2f} us of processor each"


def functions(perf: str, samples: Path, top: int) -> list[str]:
    """A line each for those that took most."""
    printed = run([perf, "report", "-i", samples, "--no-children", "--stdio", "-g", "none"])
    rows = [row for row in map(ROW.match, printed.splitlines()) if row]
    named = [
        (row[1], "kernel" if row[3] == "k" else row[2].split(".")[0], row[4].removeprefix("__pyx_f_7nbdzram_"))
        for row in rows
    ]
    return [f"  {share:>6}%  {place:<12} {function}" for share, place, function in named[:top]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    parser.add_argument("--top", type=int, default=16, help="functions")
    parser.add_argument("load", nargs="*", default=[], help=", ".join(LOADS))
    words = parser.parse_args()
    wanted = words.load or list(LOADS)
    if unknown := [name for name in wanted if name not in LOADS]:
        parser.error(f"no load {unknown[0]!r}; there are {', '.join(LOADS)}")
    perf = require_program("perf", package="linux-perf")
    with tempfile.TemporaryDirectory() as name, Nbdzram(Path(name), {"disk": SIZE}) as server:
        fill(server, SIZE)
        for load in wanted:
            samples = Path(name) / "samples"
            told = record(perf, server, samples, LOADS[load], words.seconds)
            sys.stdout.write("\n".join([f"{load}: {told}", *functions(perf, samples, words.top), "", ""]))
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
