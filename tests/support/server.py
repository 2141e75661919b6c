"""Servers as real processes, ours and nbdkit's, on a unix socket and a free loopback port."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.nbd_client import Client
from tests.support.programs import require_program

# A server starts and drains in well under a second; under an emulated or loaded machine in several.
START_SECONDS = 60
DRAIN_SECONDS = 30


def free_port() -> int:
    """Of TCP, and not among those that the kernel gives to whoever asks for none: nobody else gets it meanwhile."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


class ServerProcess:
    """A running NBD server. Leaving the context ends it by SIGTERM and holds it to exit code 0."""

    pass_fds: Sequence[int] = ()  # that the process has from us, by the same numbers

    def __init__(self, command: Sequence[str | Path], *, directory: Path, unix_path: Path, port: int | None) -> None:
        self.directory = directory
        self.unix_path = unix_path
        self.port = port
        self.log_path = directory / "server.log"
        self.command = [str(word) for word in command]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env=self.environment(),
                pass_fds=self.pass_fds,
            )
        try:
            self.wait_until(self.is_ready, START_SECONDS)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def is_ready(self) -> bool:
        return self.unix_path.exists()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for something that the process does; fail with its log when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"{self.command} ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.command}: nothing within {seconds} s:\n{self.log}"
            try:
                self.process.wait(timeout=0.02)
            except subprocess.TimeoutExpired:
                continue

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid

    def uri(self, export: str = "disk") -> str:
        return f"nbd+unix:///{export}?socket={self.unix_path}"

    def tcp_uri(self, export: str = "disk") -> str:
        assert self.port is not None
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def client(self, export: str = "disk") -> Client:
        return Client(self.unix_path, export)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """User and system time of the whole process so far (proc(5), fields 14 and 15 of stat)."""
        user, system = self._stat()[11:13]
        return (user + system) / os.sysconf("SC_CLK_TCK")

    def fresh_pages(self) -> int:
        """How many the system gave the process so far: its minor faults (field 10)."""
        return self._stat()[7]

    def _stat(self) -> list[int]:
        """What stands behind the state of its process."""
        return [0, *map(int, Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1:])]

    def stop(self) -> None:
        """End it by SIGTERM; it must drain, exit with 0 and have logged no traceback."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running {DRAIN_SECONDS} s after SIGTERM:\n{self.log}") from None
        assert code == 0, f"{self.command} ended with {code}:\n{self.log}"
        assert "Traceback" not in self.log, self.log

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()  # what failed already has the floor
            return
        self.stop()


class Nbdzram(ServerProcess):
    """`nbdzram serve` from this interpreter's environment, with its control socket and metrics."""

    def __init__(
        self,
        directory: Path,
        exports: Mapping[str, str | int],
        *,
        arguments: Sequence[str] = (),
        metrics: bool = False,
    ) -> None:
        unix_path = directory / "nbd.sock"
        self.control = directory / "control.sock"
        command: list[str | Path] = [sys.executable, "-m", "nbdzram", "serve"]
        for name, size in exports.items():
            command += ["-e", f"{name}={size}"]
        command += ["-U", unix_path, "-i", "127.0.0.1", "-p", "0", "--control", self.control]
        command += ["--metrics", "127.0.0.1:0" if metrics else "off"]
        super().__init__([*command, *arguments], directory=directory, unix_path=unix_path, port=None)
        self.port = int(self.greeting(r"NBD +nbds?://127\.0\.0\.1:(\d+)"))
        self.metrics_url = self.greeting(r"metrics +(\S+)")

    def environment(self) -> dict[str, str]:
        # Tests run it from another directory, and its own settings must not leak in.
        root = Path(__file__).resolve().parents[2]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("NBDZRAM_")}
        path = os.pathsep.join([str(root), *filter(None, [inherited.get("PYTHONPATH")])])
        return inherited | {"PYTHONPATH": path}

    def is_ready(self) -> bool:
        # It prints its addresses once it listens on all of them, and how to attach last.
        return "qemu-img info" in self.log

    def greeting(self, pattern: str) -> str:
        """What the server printed on start about itself: the first group of `pattern`."""
        found = re.search(pattern, self.log)
        assert found, f"no {pattern} in:\n{self.log}"
        return found.group(1)

    def command_line(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `nbdzram COMMAND ... --control PATH` as a user would."""
        process = subprocess.run(
            [sys.executable, "-m", "nbdzram", *words, "--control", str(self.control)],
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env=self.environment(),
            check=False,
        )
        if check:
            assert process.returncode == 0, f"nbdzram {words}: {process.returncode}\n{process.stdout}{process.stderr}"
        return process

    def fold(self) -> list[dict[str, Any]]:
        """Fold every pool; the report of each run."""
        return self._run("fold")

    def compact(self) -> list[dict[str, Any]]:
        return self._run("compact")

    def _run(self, kind: str) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = json.loads(self.command_line(kind, "--json").stdout)
        return reports

    def stat(self) -> Any:
        return json.loads(self.command_line("stat", "--json").stdout)

    def pool_status(self, name: str = "default") -> dict[str, Any]:
        """One pool's counters as `nbdzram stat --json` gives them."""
        (pool,) = (pool for pool in self.stat()["pools"] if pool["name"] == name)
        found: dict[str, Any] = pool
        return found

    def mm_stat(self) -> list[int]:
        """The ten numbers of the pool `default`."""
        return [int(word) for word in self.command_line("stat", "--mm-stat").stdout.split()]


class Nbdkit(ServerProcess):
    """nbdkit's memory plugin as a peer: allocator sparse (plain memory) or zstd (compressed)."""

    def __init__(
        self,
        directory: Path,
        size: str,
        *,
        allocator: str = "sparse",
        port: int | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        nbdkit = require_program("nbdkit", package="nbdkit")
        unix_path = directory / "nbd.sock"
        self.pid_file = directory / "nbdkit.pid"
        command: list[str | Path] = [nbdkit, "--foreground", "--pidfile", self.pid_file]
        # It listens either on a unix socket or on a port.
        command += ["-i", "127.0.0.1", "-p", str(port)] if port else ["-U", unix_path]
        command += [*arguments, "memory", size, f"allocator={allocator}"]
        super().__init__(command, directory=directory, unix_path=unix_path, port=port)

    def is_ready(self) -> bool:
        return self.pid_file.exists()
