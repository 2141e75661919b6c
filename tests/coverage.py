"""`make coverage`: which lines of the compiled modules the tests run. Lines of the .pyx and .pxd files, by gcov.

python -m tests.coverage PATH...     PATH: tests to run

Builds a copy of the project in build/coverage, so that nothing of the ordinary build changes, and prints a line a file:
how many lines, how many of them were run, and where the others are. What a server that is killed ran is not counted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[1]
COPY = PROJECT / "build/coverage"
DECLARATION = re.compile(
    r"\s*(cdef class|cdef enum|cdef extern|cdef struct|cimport|from|import|def |cdef .*:$|\"\"\"|#|@|$)"
)
"""Lines that are run when a module is loaded, or never: they say nothing of tests."""

Counts = dict[str, dict[int, int]]
"""How often each line of each file was run."""


def build() -> dict[str, str]:
    """The copy, built to count; what its programs are to find in their environment."""
    shutil.rmtree(COPY, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "*.c", "*.gc*", ".git", ".venv", ".cache", "build", "__pycache__")
    shutil.copytree(PROJECT, COPY, ignore=ignore)
    environment = os.environ | {"NBDZRAM_COVERAGE": "1", "NBDZRAM_DEBUG": "1", "PYTHONPATH": str(COPY)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=environment, check=True)
    return environment


def counted() -> Counts:
    """What gcov makes of all that was counted."""
    counts: Counts = defaultdict(lambda: defaultdict(int))
    for notes in sorted(COPY.glob("build/**/*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        printed = subprocess.run(command, cwd=COPY, check=True, capture_output=True, text=True).stdout
        for line in printed.splitlines():
            for file in json.loads(line)["files"]:
                if file["file"].startswith("nbdzram/") and file["file"].endswith((".pyx", ".pxd")):
                    for found in file["lines"]:
                        counts[file["file"]][found["line_number"]] += found["count"]
    return counts


def stretches(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as 1-3 7."""
    joined: list[list[int]] = []
    for number in sorted(numbers):
        if joined and number == joined[-1][1] + 1:
            joined[-1][1] = number
        else:
            joined.append([number, number])
    return " ".join(f"{first}-{last}" if first != last else str(first) for first, last in joined)


def report(counts: Counts, texts: Mapping[str, list[str]]) -> list[str]:
    """The table, a line a file, those with most that no test runs first."""
    rows = []
    for name, lines in counts.items():
        text = dict(enumerate(texts[name], start=1))  # Cython names lines behind the end, for what has none
        told = {number: count for number, count in lines.items() if not DECLARATION.match(text.get(number, ""))}
        missed = [number for number, count in told.items() if count == 0]
        if told:
            rows.append((len(missed), len(told), name, stretches(missed)))
    rows.sort(reverse=True)
    all_lines, all_missed = sum(row[1] for row in rows), sum(row[0] for row in rows)
    table = [f"{'lines':>6} {'run':>6}  file, and the lines that were not run"]
    table += [
        f"{lines:>6} {100 * (lines - missed) // lines:>5}%  {name}  {where}" for missed, lines, name, where in rows
    ]
    return [*table, f"{all_lines:>6} {100 * (all_lines - all_missed) / max(all_lines, 1):>5.1f}%  all"]


def main() -> int:
    environment = build()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:]]
    outcome = subprocess.run(command, cwd=COPY, env=environment, check=False).returncode
    counts = counted()
    texts = {name: (COPY / name).read_text(encoding="utf-8").splitlines() for name in counts}
    sys.stdout.write("\n".join(report(counts, texts)) + "\n")
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
