"""The Debian package: its recipe at a glance; and, in the slow lane, built, installed, used, removed and purged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.deploy.grafana import DEPLOY
from tests.support.programs import run

RECIPE = DEPLOY / "debian"
# Runs in a mount namespace of its own: the machine's file system with a layer on top that goes with the namespace.
IN_A_LAYER = """
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
cp "$2" "$1/root/nbdzram.deb"
exec chroot "$1/root" sh -eux -c "$3"
"""
LIFE_OF_A_PACKAGE = """
dpkg --force-depends --install /nbdzram.deb
getent passwd nbdzram
nbdzram --version
runuser -u nbdzram -- nbdzram serve --config /etc/nbdzram/nbdzram.toml --check-config
test "$(stat -c %a:%G /etc/nbdzram/nbdzram.toml)" = 640:nbdzram
/usr/bin/python3 -I -c 'import sys; sys.path.insert(0, "/usr/lib/nbdzram"); import nbdzram.server.service'
systemd-analyze verify --man=no nbdzram.service nbdzram.socket
dpkg --remove nbdzram
test ! -e /usr/lib/nbdzram
test -e /etc/nbdzram/nbdzram.toml
dpkg --purge nbdzram
test ! -e /etc/nbdzram
"""


@pytest.mark.parametrize("script", ["build", "postinst", "prerm", "postrm"])
def test_script_is_one_that_sh_can_read(script: str) -> None:
    """Executable, strict, and without a syntax error."""
    path = RECIPE / script
    assert os.access(path, os.X_OK)
    assert re.search(r"^set -eu?$", path.read_text(), re.MULTILINE)
    run(["sh", "-n", path])


def test_recipe_installs_files_that_exist() -> None:
    """Every file that `install` takes from the tree is there."""
    taken = re.findall(r'install -D -m \d+ "\$(root|here)/([\w./-]+)"', (RECIPE / "build").read_text())
    assert len(taken) > 5
    for base, name in taken:
        assert ((RECIPE if base == "here" else DEPLOY.parent) / name).is_file(), name


@pytest.mark.slow
def test_package_installs_serves_and_leaves_nothing(package: Path, tmp_path: Path) -> None:
    """Installed and purged in a layer over this machine's file system."""
    depends = run(["dpkg-deb", "--field", package, "Depends"])
    assert re.search(r"\bpython3\.\d+,", depends), "a release upgrade must not remove it: no upper bound on python3"
    assert "<<" not in depends
    listed = run(["dpkg-deb", "--contents", package])
    assert "./lib/systemd/system/nbdzram.socket" in listed
    assert "./usr/share/man/man1/nbdzram-serve.1.gz" in listed
    assert "./usr/share/fish/vendor_completions.d/nbdzram.fish" in listed
    assert "__pycache__" not in listed
    assert not re.search(r"^\S+ (?!root/root)", listed, re.MULTILINE)
    layer = tmp_path / "layer"
    layer.mkdir()
    run(["unshare", "--mount", "sh", "-c", IN_A_LAYER, "sh", layer, package, LIFE_OF_A_PACKAGE])
