"""A wheel of this tree, installed as README says: by pipx and by uv, for a user who has nothing else.

Slow lane: it asks a package index for the two tools and for what nbdzram needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdzram import __version__
from tests.deploy.grafana import DEPLOY
from tests.support.programs import require_program

pytestmark = pytest.mark.slow

ROOT = DEPLOY.parent
README = (ROOT / "README.md").read_text()
INSTALL_SECONDS = 600
REACH_AN_INDEX = ("PIP_", "SSL_", "REQUESTS_", "HTTPS_", "HTTP_", "https_", "http_")
"""Variables that say how this machine does."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes, from what is compiled in the tree."""
    place = tmp_path_factory.mktemp("wheel")
    steps = f"build --build-base {place}/build bdist_wheel --dist-dir {place} --bdist-dir {place}/bdist"
    command = [sys.executable, "setup.py", "--quiet", *steps.split()]
    environment = {"PATH": "/usr/bin:/bin", "NBDZRAM_COMPILE": "done", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    (file,) = place.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pipx and uv, as their own documentation installs them, in an environment that has nothing of ours."""
    place = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", place], check=True, capture_output=True)
    install: list[str | Path] = [place / "bin" / "python", "-m", "pip", "--quiet", "install", "pipx", "uv"]
    subprocess.run(install, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    return place / "bin"


@pytest.mark.parametrize("words", ["pipx install", "uv tool install"])
def test_a_wheel_is_a_program_of_a_user_who_has_nothing_else(
    wheel: Path, tools: Path, tmp_path: Path, words: str
) -> None:
    """Installed into a bare home, it says its version, serves a disk to another program, and can be taken away."""
    assert f"`{words} dist/nbdzram-*.whl`" in README
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    environment = {name: value for name, value in os.environ.items() if name.startswith(REACH_AN_INDEX)}
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}/.local/bin:{tools}:/usr/bin:/bin"}
    environment |= {"UV_PYTHON": sys.executable, "PIPX_DEFAULT_PYTHON": sys.executable}

    def do(*command: str | Path) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    program = tmp_path / ".local" / "bin" / "nbdzram"
    do(*words.split(), wheel)
    assert do(program, "--version") == f"nbdzram {__version__}\n"
    assert do(program, "serve", "-e", "disk=1M", "--run", f"{nbdinfo} --size $uri") == "1048576\n"
    assert "nbdzram exports" in do(program, "exports", "--help")
    tool = words.removesuffix(" install")
    do(*tool.split(), "uninstall", "nbdzram")
    assert not program.exists()
