"""A control group of our own, of either version, for programs that must live within a limit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
LIMIT_FILES = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max", "pids.max")}
"""A controller's limit in version 2 and in version 1."""


@contextlib.contextmanager
def cgroup(controller: str, limit: int) -> Iterator[Path]:
    """A group with a limit; skips where none can be made. Its members must have ended when it is left."""
    old = (ROOT / controller).is_dir()
    parent = ROOT / controller if old else ROOT
    directory = parent / f"nbdzram-test-{os.getpid()}"
    try:
        if not old:
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        set_limit(directory, controller, limit)
        yield directory
    finally:
        deadline = time.monotonic() + 10
        while (directory / "cgroup.procs").read_text() and time.monotonic() < deadline:
            os.sched_yield()
        directory.rmdir()


def set_limit(directory: Path, controller: str, limit: int) -> None:
    (directory / LIMIT_FILES[controller][(ROOT / controller).is_dir()]).write_text(str(limit))


def inside(directory: Path, command: Sequence[str | Path]) -> list[str]:
    """The command, started as a member."""
    return ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(directory), *map(str, command)]


def run_inside(directory: Path, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(inside(directory, command), capture_output=True, text=True, timeout=60, check=False)


def oom_kills(cage: Path) -> int:
    """How often the kernel ended somebody in the group."""
    files = [cage / name for name in ("memory.events", "memory.oom_control")]
    text = "".join(file.read_text() for file in files if file.exists())
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))
