"""What clients see of a takeover: the longest pause of one that never rests, beside eight that write and verify.

python -m tests.bench.acceptance pauses
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench.figures import Figure
from tests.support.takeover import Line, fill_half, take_over_under_fio

TIMES = 20  # a round


def measure_pauses(rounds: int) -> list[Figure]:
    """With 256 MiB stored, in memory and in a state directory on tmpfs."""
    figures = []
    for where in ("memory", "tmpfs"):
        with tempfile.TemporaryDirectory(prefix="nbdzram-bench-", dir="/dev/shm") as directory:
            line = Line(Path(directory), in_memory=where == "memory")
            try:
                fill_half(line)
                longest = take_over_under_fio(line, TIMES * rounds)
            finally:
                line.last.stop()
        what = f"longest pause of {TIMES * rounds} takeovers, {where}, ms"
        figures.append(Figure(what, longest * 1e3, 100.0, False, ""))
    return figures
