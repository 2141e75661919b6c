"""README's two commands on a bare Debian, in a chroot that has what debootstrap puts there and nothing else.

Slow lane: what is missing is installed by README's own line. It reaches apt's and pip's servers only. Root.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.grafana import DEPLOY
from tests.support.machine import enter, layer_over, reach_packages, require_base, run_in
from tests.support.nbd_client import Client
from tests.support.server import ServerProcess, free_port

pytestmark = pytest.mark.slow

ROOT = DEPLOY.parent
CLONE = "nbdzram"
INSTALL_SECONDS = 900
BUILD_SECONDS = 1800  # everything is compiled, and other tests may run meanwhile
TEST_SECONDS = 1800
FEW_TESTS = "tests/unit/nbd tests/unit/test_units.py"  # all of them take their time on a system that is whole
BARE = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive")


class MakeRun(ServerProcess):
    """`make run` in a chroot, with ports of its own; killed in the end, as the whole chroot is."""

    def __init__(self, root: Path, directory: Path) -> None:
        port = free_port()
        make = ["make", "-C", f"/{CLONE}", "run", f"PORT={port}", "METRICS=off"]
        super().__init__(enter(root, [*BARE, *make]), directory=directory, unix_path=directory / "none", port=port)

    def is_ready(self) -> bool:
        return "is ready" in self.log

    def wait_until(self, condition: object, seconds: float) -> None:
        """It builds before it starts."""
        super().wait_until(condition, max(seconds, BUILD_SECONDS))  # type: ignore[arg-type]

    def stop(self) -> None:
        self.kill()


def _clone(root: Path) -> None:
    """What git has of this tree, or would take, as it lies here."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    there = b"\0".join(name for name in files.split(b"\0") if name and (ROOT / os.fsdecode(name)).exists())
    target = root / CLONE
    target.mkdir()
    pack = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(pack, cwd=ROOT, input=there, capture_output=True, check=True).stdout
    unpack = ["tar", "--extract", "--no-same-owner", f"--directory={target}"]
    subprocess.run(unpack, input=packed, check=True)


def _readme_installs() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Two commands\n")[1].split("\n## ")[0]
    (line,) = re.findall(r"^# (apt-get install .*)$", section, re.MULTILINE)
    words: list[str] = line.split()
    return words


def _do(root: Path, *words: str, seconds: float) -> str:
    done = run_in(root, [*BARE, *words], seconds=seconds)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
def test_two_commands_are_enough_on_a_bare_debian(release: str, tmp_path: Path) -> None:
    """`make run` builds and serves; `make test` sets up the tools, checks, and tests (here a few)."""
    with layer_over(require_base(release), tmp_path / "layer") as root:
        reach_packages(root)
        _clone(root)
        _do(root, "apt-get", "update", seconds=INSTALL_SECONDS)
        _do(root, *_readme_installs(), "--yes", seconds=INSTALL_SECONDS)
        with MakeRun(root, tmp_path) as server:
            assert server.port is not None
            with Client(("127.0.0.1", server.port), "disk") as client:
                client.write(0, b"a" * 4096)
                assert client.read(0, 4096) == b"a" * 4096
        told = _do(root, f"PYTEST_ADDOPTS={FEW_TESTS}", "make", "-C", f"/{CLONE}", "test", seconds=TEST_SECONDS)
        assert re.search(r"=+ \d+ passed in ", told), told
