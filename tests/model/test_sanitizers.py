"""The engine's tests once more, built for the address and undefined-behaviour sanitizers, with every assertion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SUITES = ("tests/unit/engine", "tests/model/test_threads.py", "tests/model/test_engine.py")


def library(name: str) -> str:
    """A sanitizer's runtime, as gcc names it: it must be loaded before Python is."""
    place = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(place).is_absolute():
        pytest.skip(f"gcc has no {name}: install libgcc's development files")
    return place


@pytest.mark.slow
def test_the_engine_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    runtimes = f"{library('libasan.so')} {library('libubsan.so')}"
    copy = tmp_path / "project"
    ignore = shutil.ignore_patterns("*.so", "*.c", ".git", ".venv", ".cache", "build", "__pycache__")
    shutil.copytree(PROJECT, copy, ignore=ignore)
    environment = {**os.environ, "NBDZRAM_SANITIZE": "address,undefined", "NBDZRAM_DEBUG": "1", "PYTHONPATH": str(copy)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=copy, env=environment, check=True, capture_output=True)
    built = next((copy / "nbdzram/engine").glob("pool.*.so"))
    assert b"__asan_report_load8" in built.read_bytes(), "the build is not instrumented"
    # Python itself leaks at exit on purpose; pymalloc would hide overflows inside its arenas.
    reports = tmp_path / "report"  # of the address sanitizer; the other one's go to standard error
    environment |= {"LD_PRELOAD": runtimes, "PYTHONMALLOC": "malloc"}
    environment |= {"ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}"}
    environment |= {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *SUITES]
    tests.append("--capture=sys")  # the default would swallow what a sanitizer says as it ends the process
    outcome = subprocess.run(tests, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    told = "".join(path.read_text()[:8000] for path in tmp_path.glob("report*"))
    assert outcome.returncode == 0, told + outcome.stdout[-8000:] + outcome.stderr[:8000]
