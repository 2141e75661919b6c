"""The compiled data plane without memory of its own: each allocation is refused, alone and with all behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXPECTED = HERE / "no_memory.txt"  # what `python -m tests.faults.no_memory` prints with the library before libc


def test_whichever_allocation_is_refused_it_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """Nobody crashes, what is counted agrees, what was charged comes back, and each refusal is told as it was."""
    library = tmp_path / "no_memory.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "no_memory.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.no_memory"],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == EXPECTED.read_text(encoding="utf-8").splitlines()
