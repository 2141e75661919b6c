"""The Debian package, built once for all tests of the slow lane that install it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.grafana import DEPLOY
from tests.support.programs import require_program, require_root

BUILD_SECONDS = 1800  # it compiles the data plane, and other tests may run meanwhile


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tree by Debian's own Python."""
    require_root("installs a package in a file system of its own")
    require_program("dpkg-deb", package="dpkg")
    place = tmp_path_factory.mktemp("package")
    command = [DEPLOY / "debian" / "build"]
    subprocess.run(command, env=dict(os.environ) | {"OUTPUT": str(place)}, check=True, timeout=BUILD_SECONDS)
    (built,) = place.glob("nbdzram_*.deb")
    return built
