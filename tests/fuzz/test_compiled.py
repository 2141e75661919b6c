"""The same searches over compiled code that tells which of its branches were taken, and stops at a stray pointer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.support.programs import require_program
from tests.support.sanitized import built_for

RUNS = {"transmit": 20000, "forge": 2000}  # some minutes each, and two for the build
SHARE = int(os.environ.get("FUZZ_RUNS", "0"))  # what `make fuzz` asks for: instead of those, and a tenth for forgeries


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where the project was built for the fuzzer, and the environment that its programs want."""
    found = importlib.util.find_spec("atheris")
    if found is None or found.origin is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64 only")
    clang = require_program("clang", package="clang")
    copy, environment = built_for("address,fuzzer-no-link", tmp_path_factory.mktemp("compiled"), compiler=str(clang))
    built = next((copy / "nbdzram/engine").glob("opening.*.so")).read_bytes()
    assert b"__sanitizer_cov_8bit_counters_init" in built, "the build does not count its branches"
    runtime = Path(found.origin).parents[1] / "asan_with_fuzzer.so"
    # What the compiled code reads and writes is Python's own memory too, so that must not hide behind arenas.
    return copy, environment | {
        "LD_PRELOAD": str(runtime), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", RUNS)
def test_a_search_that_sees_compiled_branches_finds_nothing(
    target: str, compiled: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    copy, environment = compiled
    runs = SHARE // (10 if target == "forge" else 1) or RUNS[target]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", target, corpus, seeds.CORPUS / target),
            *(f"-runs={runs}", "-timeout=120", "-len_control=0", "-rss_limit_mb=8192"),
        ],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-8000:]
    assert f"Done {runs} runs" in process.stderr
