"""The engine's tests once more, built for the sanitizers of memory, undefined behaviour and threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sanitized import built_for, library

SUITES = ("tests/unit/engine", "tests/model/test_threads.py", "tests/model/test_engine.py")
THREADED = (
    "tests/model/test_writers.py",
    "tests/model/test_writers_and_runs.py",
    "tests/model/test_readers.py",
    "tests/model/test_threads.py",
    "tests/model/test_extents.py",
)
MEASURED = "tests/unit/engine/test_memory.py"  # resident bytes and addresses, of which the sanitizer takes its own
SUPPRESSED = (
    # glibc takes the memory of a thread that has ended, and the sanitizer does not see how it knows.
    "race:_dl_deallocate_tls",
    # Hints, looked at again under the lock, or whose wrong answer costs nothing.
    "race_top:Index_prefetch_chain",
    "race_top:Slab_is_evacuating",
    "race:Slab_is_emptied",
    "race_top:Directory_state",
    "race_top:Check__has_census",
    # What a run or somebody who asks is told: whole words, of this moment or the one before.
    "race_top:Run_2step",
    "race_top:Compact__step",
    "race_top:set_clock",
    "race_top:Disk__take_size",
    # Tests switch these on and off beside those who look at them.
    "race_top:test_locks",
    "race_top:_test_stripes",
    "race_top:lock_linger",
    "race_top:lingering",
)
"""Of the thread sanitizer: what it reports and is meant so."""


def pytest_over(*suites: str) -> list[str]:
    """How pytest is called. The default capture would swallow what a sanitizer says as it ends the process."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    return [sys.executable, "-m", "pytest", *options, "-m", "not slow", *suites]


@pytest.mark.slow
def test_threads_of_the_engine_are_clean_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """`make tsan`. Python itself is not built for it; what its own lock orders the sanitizer sees all the same."""
    runtime = library("libtsan.so")
    copy, environment = built_for("thread", tmp_path)
    built = next((copy / "nbdzram/engine").glob("beside.*.so"))
    assert b"__tsan_read8" in built.read_bytes(), "the build is not instrumented"
    known = tmp_path / "suppressed"
    known.write_text("\n".join(SUPPRESSED) + "\n")
    options = f"suppressions={known}:log_path={tmp_path / 'report'}:exitcode=0:history_size=4"
    environment |= {"LD_PRELOAD": runtime, "PYTHONMALLOC": "malloc", "TSAN_OPTIONS": options}
    outcome = subprocess.run(
        pytest_over(*THREADED), cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    told = "".join(path.read_text()[:8000] for path in tmp_path.glob("report*"))
    assert outcome.returncode == 0, outcome.stdout[-8000:] + outcome.stderr[:8000]
    assert not told, told


@pytest.mark.slow
def test_the_engine_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    runtimes = f"{library('libasan.so')} {library('libubsan.so')}"
    copy, environment = built_for("address,undefined", tmp_path)
    built = next((copy / "nbdzram/engine").glob("pool.*.so"))
    assert b"__asan_report_load8" in built.read_bytes(), "the build is not instrumented"
    # Python itself leaks at exit on purpose; pymalloc would hide overflows inside its arenas.
    reports = tmp_path / "report"  # of the address sanitizer; the other one's go to standard error
    environment |= {"LD_PRELOAD": runtimes, "PYTHONMALLOC": "malloc"}
    environment |= {"ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}"}
    environment |= {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    outcome = subprocess.run(
        [*pytest_over(*SUITES), f"--ignore={MEASURED}"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = "".join(path.read_text()[:8000] for path in tmp_path.glob("report*"))
    assert outcome.returncode == 0, told + outcome.stdout[-8000:] + outcome.stderr[:8000]
