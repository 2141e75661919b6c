"""The project, built so that what the compiled code does wrong is seen: by a compiler's sanitizers, by a fuzzer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def library(name: str) -> str:
    """A sanitizer's runtime, as gcc names it: it must be loaded before Python is."""
    place = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(place).is_absolute():
        pytest.skip(f"gcc has no {name}: install libgcc's development files")
    return place


def built_for(
    sanitizers: str, directory: Path, *, compiler: str = "gcc", own_runtime: bool = False
) -> tuple[Path, dict[str, str]]:
    """A copy of the project that is built so, and what its programs are to find in their environment.

    own_runtime: it is not linked with the sanitizer's, as another takes its place, and has none of our assertions.
    """
    copy = directory / "project"
    ignore = shutil.ignore_patterns("*.so", "*.c", ".git", ".venv", ".cache", "build", "__pycache__")
    shutil.copytree(PROJECT, copy, ignore=ignore)
    environment = {**os.environ, "NBDZRAM_SANITIZE": sanitizers, "PYTHONPATH": str(copy)}
    environment["NBDZRAM_RUNTIME" if own_runtime else "NBDZRAM_DEBUG"] = "1"
    environment |= {"CC": compiler, "LDSHARED": f"{compiler} -shared"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=copy, env=environment, check=True, capture_output=True)
    return copy, environment
