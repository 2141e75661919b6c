"""A real server process, and the command line run against it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.programs import require_program

NBDZRAM = [sys.executable, "-m", "nbdzram"]


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


class Server:
    """A `nbdzram serve` process on unix sockets of its own."""

    def __init__(self, directory: Path, arguments: tuple[str, ...]) -> None:
        self.control = directory / "control.sock"
        self.socket = directory / "nbd.sock"
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *NBDZRAM,
                    "serve",
                    "-U",
                    str(self.socket),
                    "--control",
                    str(self.control),
                    "--metrics",
                    "127.0.0.1:0",
                    *arguments,
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=clean_environment(),
            )
        assert self.process.stdout is not None
        self.greeting: list[str] = []
        for line in self.process.stdout:
            self.greeting.append(line.rstrip())
            if line.startswith("  qemu-img"):
                return
        raise AssertionError(self.log.read_text())

    def run(self, *arguments: str) -> Done:
        """One client command against this server."""
        return run(*arguments, "--control", str(self.control))

    def wait_for_log(self, told: str) -> None:
        deadline = time.monotonic() + 60
        while told not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            os.sched_yield()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


def clean_environment() -> dict[str, str]:
    """Without what would be taken for settings, or for the size of a terminal that a command does not have."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NBDZRAM_") and name not in {"COLUMNS", "LINES"}
    }


def run(*arguments: str) -> Done:
    done = subprocess.run(
        [*NBDZRAM, *arguments], capture_output=True, text=True, timeout=120, check=False, env=clean_environment()
    )
    return Done(done.returncode, done.stdout, done.stderr)


def make_certificate(directory: Path, name: str) -> None:
    """A certificate signed by itself, cert.pem, and its key.pem."""
    openssl = require_program("openssl", package="openssl")
    make = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-days", "10", "-subj", f"/CN={name}", "-keyout", str(directory / "key.pem")]
    make += ["-out", str(directory / "cert.pem")]
    subprocess.run(make, check=True, capture_output=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; each must have ended well, with nothing like a traceback in its log."""
    servers: list[Server] = []

    def start_one(*arguments: str) -> Server:
        directory = tmp_path / f"server{len(servers)}"
        directory.mkdir()
        servers.append(Server(directory, arguments))
        return servers[-1]

    yield start_one
    for server in servers:
        if server.process.poll() is None:
            assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


UNSYNCABLE = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int file) {
    struct stat found;
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode)) { errno = EIO; return -1; }
    return (int)syscall(SYS_fsync, file);
}
"""


@pytest.fixture
def unsyncable(tmp_path: Path) -> dict[str, str]:
    """An environment in which each file that is synced fails, as on a disk that does."""
    source, built = tmp_path / "unsyncable.c", tmp_path / "unsyncable.so"
    source.write_text(UNSYNCABLE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(source)], check=True, capture_output=True)
    return {"LD_PRELOAD": str(built)}
