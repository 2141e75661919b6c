"""What a test needs from the machine: a missing program skips on a user's machine and fails in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# Debian's administration tools live where a user's PATH does not look.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

# No single program in these tests runs longer; a hang is then a failure with a name, not a stuck run.
PROGRAM_SECONDS = 300


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def missing(reason: str) -> NoReturn:
    """Skip and say why; in CI, where everything must be there, fail."""
    import pytest  # here, because `make demo` and `make bench` use this module without pytest

    if in_ci():
        pytest.fail(reason)
    pytest.skip(reason)


def require_program(name: str, *, package: str) -> str:
    """The path of a program of others, which Debian ships in `package`."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        missing(f"{name} is not installed; try: apt-get install {package}")
    return path


def require_file(path: Path, *, package: str) -> Path:
    if not path.exists():
        missing(f"{path} is not there; try: apt-get install {package}")
    return path


def require_root(why: str) -> None:
    if os.geteuid() != 0:
        missing(f"needs root: {why}")


def run(
    command: Sequence[str | Path],
    *,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
    directory: Path | None = None,
) -> str:
    """Run to the end and return what it printed; any other exit code than 0 fails the test with the whole output."""
    process = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        env=environment,
        user=user,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    if process.returncode != 0:
        words = " ".join(map(str, command))
        raise AssertionError(f"{words}\nexit code {process.returncode}\n{process.stdout}{process.stderr}")
    return process.stdout
