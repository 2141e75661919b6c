"""A Docker engine of the test's own: its state, socket and images lie in one directory, and end with it.

It gets no bridge and no firewall rules (the host's stay as they are), so a container has the host's network or none.
Images are of Docker's classic builder, which every engine has; BuildKit's needs a plugin that Debian does not ship.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tests.support.programs import require_program, require_root
from tests.support.server import ServerProcess

BUILD_SECONDS = 1800  # it compiles the data plane, and copies the base image for each layer
COMMAND_SECONDS = 300
DOWNLOADS = "./var/cache/apt/archives"


class Engine(ServerProcess):
    """`dockerd` and its command line. Leaving the context removes its containers and ends it."""

    def __init__(self, directory: Path) -> None:
        require_root("runs a Docker engine")
        dockerd = require_program("dockerd", package="docker.io")
        self.docker = require_program("docker", package="docker.io")
        self.socket = directory / "docker.sock"
        command = [dockerd, "--iptables=false", "--bridge=none", "--storage-driver=vfs"]
        command += [f"--data-root={directory / 'images'}", f"--exec-root={directory / 'running'}"]
        command += [f"--pidfile={directory / 'dockerd.pid'}", f"--host=unix://{self.socket}"]
        super().__init__(command, directory=directory, unix_path=self.socket, port=None)

    def environment(self) -> dict[str, str]:
        """For programs that speak with this engine."""
        return dict(os.environ) | {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "0"}

    def is_ready(self) -> bool:
        return self.socket.exists() and self._run(["version"], seconds=COMMAND_SECONDS).returncode == 0

    def run(self, *words: str | Path, seconds: float = COMMAND_SECONDS) -> str:
        """What `docker WORDS` prints; any other exit code than 0 fails the test."""
        done = self._run(words, seconds=seconds)
        assert done.returncode == 0, f"docker {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def import_root(self, root: Path, image: str) -> None:
        """A directory becomes an image of one layer."""
        pack = ["tar", f"--directory={root}", f"--exclude={DOWNLOADS}", "--create", "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            self._run(["import", "-", image], seconds=COMMAND_SECONDS, stdin=packing.stdout).check_returncode()
        assert packing.returncode == 0

    def inspect(self, container: str) -> dict[str, Any]:
        """Everything that the engine knows of a container."""
        (found,) = json.loads(self.run("inspect", container))
        known: dict[str, Any] = found
        return known

    def logs(self, container: str) -> str:
        """Standard output and error of a container."""
        done = self._run(["logs", container], seconds=COMMAND_SECONDS)
        return done.stdout + done.stderr

    def kill(self) -> None:
        """As gently as stop: containers would outlive an engine that is killed. One that has ended is asked nothing."""
        if self.process.poll() is None:
            self.stop()
        else:  # what failed already has the floor
            shutil.rmtree(self.directory / "images", ignore_errors=True)

    def stop(self) -> None:
        """Remove every container; the engine then ends within seconds."""
        containers = self.run("ps", "--all", "--quiet").split()
        if containers:
            self.run("rm", "--force", "--volumes", *containers)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(COMMAND_SECONDS) == 0, self.log
        for namespace in (self.directory / "running" / "netns").glob("*"):
            subprocess.run(
                ["umount", namespace], check=True
            )  # the engine leaves it mounted, and in nobody's way to remove
        shutil.rmtree(self.directory / "images")  # gigabytes: vfs copies a whole image for each layer

    def _run(
        self, words: Sequence[str | Path], *, seconds: float, stdin: IO[bytes] | int | None = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.docker, *words],
            env=self.environment(),
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
