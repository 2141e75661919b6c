"""Try mistakes, one at a time, and say which of them the tests let through.

    python -m tests.mutants                      all of them
    python -m tests.mutants --part 10            a tenth, drawn by the day
    python -m tests.mutants NAME... | AREA...    some
    python -m tests.mutants --jobs 1             one at a time (default: as many as there are processors)
    python -m tests.mutants --minutes 5          begin no other one after so long; says how many were not tried

Each is applied to a copy of the tree, the modules that it touches are built alone, its tests run, and the copy is put
right again. Before their first mistake the same tests run without any: one that fails by itself finds nothing. What is
let through without a reason is named. Exits with 1 when that is more than a tenth: threads meet by chance in a few of
these tests.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from tests.mutants.catalogue import PROJECT, Mutant, draw, read

LEAST_FOUND = 0.9  # or explained, of those tried
BUILD_SECONDS = 300
TEST_SECONDS = 120  # a test that hangs on a mistake has found it
NOT_COPIED = (".git", ".venv", ".cache", "dist", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
BUILD = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
BUILT = ("*.so", "*.c", "*.o")  # in the package and below build/, from where the next build would take them


class Outcome(Enum):
    """What became of a mistake."""

    FOUND = "found"
    SURVIVED = "SURVIVED"
    BROKEN = "DOES NOT BUILD"
    UNPROVEN = "TESTS FAIL"  # without the mistake, too


class Copy:
    """A built copy of the project in which one mistake at a time is made."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.root = directory / "project"
        shutil.copytree(source, self.root, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        self.environment = {**os.environ, "PYTHONPATH": str(self.root)}
        code, printed = self._run(BUILD, BUILD_SECONDS)  # what is built here does not have to be built once more
        if code != 0:
            sys.exit(f"the project does not build:\n{printed[-4000:]}")
        self.pristine = directory / "pristine"
        shutil.copytree(self.root, self.pristine, symlinks=True)

    def try_out(self, mutant: Mutant) -> tuple[Outcome, str]:
        """Make the mistake, build, test, and put everything right. What was printed comes with the outcome."""
        place = self.root / mutant.file
        right = place.read_text(encoding="utf-8")
        stamp = place.stat()
        place.write_text(mutant.applied_to(right), encoding="utf-8")
        try:
            if place.suffix in {".pyx", ".pxd"}:
                code, printed = self._run(BUILD, BUILD_SECONDS)
                if code != 0:
                    return Outcome.BROKEN, printed
            code, printed = self.test(mutant.tests)
            return (Outcome.SURVIVED if code == 0 else Outcome.FOUND), printed
        finally:
            place.write_text(right, encoding="utf-8")
            os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            self._put_back_what_was_built()

    def test(self, tests: Sequence[str]) -> tuple[int, str]:
        """The tests' exit status, and what they printed."""
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        return self._run([*pytest, *tests], TEST_SECONDS)

    def _put_back_what_was_built(self) -> None:
        for pattern in BUILT:
            for kept in self.pristine.rglob(pattern):
                now = self.root / kept.relative_to(self.pristine)
                if not now.exists() or now.stat().st_mtime_ns != kept.stat().st_mtime_ns:
                    now.unlink(missing_ok=True)
                    shutil.copy2(kept, now)

    def _run(self, command: Sequence[str], seconds: float) -> tuple[int, str]:
        """Run in a process group of its own, which ends with the command: nothing that a test started stays behind."""
        cut = ""
        with tempfile.TemporaryFile("w+") as printed:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code, cut = -signal.SIGKILL, f"\ncut off after {seconds:g} s: {' '.join(command[:4])} ..."
            finally:
                if process.poll() is None or _group_lives(process.pid):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            printed.seek(0)
            return code, printed.read() + cut


class Proof:
    """That some tests pass without any mistake: found out once, by whoever needs it first; others wait for that."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._passed: bool | None = None

    def holds(self, copy: Copy, tests: Sequence[str]) -> bool:
        with self._lock:
            if self._passed is None:
                code, printed = copy.test(tests)
                self._passed = code == 0
                if code != 0:
                    words = f"{' '.join(tests)} fails without any mistake, and so cannot find one"
                    print(f"{words}:\n{printed[-4000:]}", flush=True)
            return self._passed


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def chosen(mutants: list[Mutant], names: Sequence[str], part: int, day: datetime.date) -> list[Mutant]:
    """Those asked for by name or area; without names one in `part`."""
    known = {name for mutant in mutants for name in (mutant.name, mutant.area)}
    for name in names:
        if name not in known:
            sys.exit(f"no mutant or area is called {name!r}; areas: {', '.join(sorted({m.area for m in mutants}))}")
    if names:
        return [mutant for mutant in mutants if mutant.name in names or mutant.area in names]
    return draw(mutants, part, day)


def in_chance_order(mutants: Sequence[Mutant], chance: random.Random) -> list[Mutant]:
    """Whom the time is too short for is chance as well. Those of the same tests together, which are proved once."""
    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(mutant.tests, []).append(mutant)
    return [mutant for tests in chance.sample(list(groups), len(groups)) for mutant in groups[tests]]


def try_all(mutants: list[Mutant], jobs: int, minutes: float) -> dict[str, Outcome]:
    """Each mistake's outcome, printed as it is known; of those that were begun within so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    proofs = {mutant.tests: Proof() for mutant in mutants}
    with tempfile.TemporaryDirectory(prefix="nbdzram-mutants-") as directory, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        source = PROJECT
        for number in range(jobs):
            copy = Copy(Path(directory) / str(number), source)
            copies.put(copy)
            source = copy.root  # built already

        def attempt(mutant: Mutant) -> None:
            if time.monotonic() > deadline:
                return
            copy = copies.get()
            started = time.monotonic()
            try:
                if not proofs[mutant.tests].holds(copy, mutant.tests):
                    outcomes[mutant.name] = Outcome.UNPROVEN
                    return
                outcome, printed = copy.try_out(mutant)
            finally:
                copies.put(copy)
            outcomes[mutant.name] = outcome
            seconds = time.monotonic() - started
            why = f" ({mutant.survives})" if outcome is Outcome.SURVIVED and mutant.survives else ""
            print(f"{outcome.value:>14}  {seconds:4.0f} s  {mutant.area}: {mutant.name}{why}", flush=True)
            if outcome is Outcome.BROKEN:
                print(printed[-2000:], flush=True)

        for done in [pool.submit(attempt, mutant) for mutant in mutants]:
            done.result()
    return outcomes


def main() -> int:
    """The command line. The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Do the tests find mistakes?")
    parser.add_argument("names", nargs="*", metavar="NAME|AREA", help="try these; default: all, or a part")
    parser.add_argument("--part", type=int, default=1, metavar="N", help="try one in N, drawn by the day")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="how many at once")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="begin none after so long")
    words = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC).date()
    asked = chosen(read(), words.names, words.part, today)
    asked = in_chance_order(asked, random.Random(today.toordinal()))
    outcomes = try_all(asked, words.jobs, words.minutes)
    mutants = [mutant for mutant in asked if mutant.name in outcomes]
    if len(mutants) < len(asked):
        print(f"{len(asked) - len(mutants)} of {len(asked)} were not tried within {words.minutes:g} minutes")
    if not mutants:
        return 1
    found = sum(outcome is Outcome.FOUND for outcome in outcomes.values())
    bad = [
        mutant.name
        for mutant in mutants
        if outcomes[mutant.name] in {Outcome.BROKEN, Outcome.UNPROVEN}
        or (outcomes[mutant.name] is Outcome.SURVIVED and not mutant.survives)
    ]
    for mutant in mutants:
        if mutant.survives and outcomes[mutant.name] is Outcome.FOUND:
            print(f"{mutant.name} is found now: take its reason for surviving away")
    print(f"{found} of {len(mutants)} mistakes found, {100 * found / len(mutants):.0f} percent")
    if bad:
        print(f"let through without a reason, or not tried: {', '.join(bad)}")
    return 1 if len(mutants) - len(bad) < LEAST_FOUND * len(mutants) else 0


if __name__ == "__main__":
    sys.exit(main())
