"""What is handed to others: the source archive, what a package index shows, completion in a real shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.deploy.grafana import DEPLOY
from tests.support.programs import require_program
from tests.support.server import Nbdzram
from tools import manual

ROOT = DEPLOY.parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the source archive, without its first directory."""
    place = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(place)]
    environment = dict(os.environ) | {"NBDZRAM_COMPILE": "no", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (file,) = place.glob("*.tar.gz")
    with tarfile.open(file) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


def test_the_source_archive_has_what_a_packager_wants(archive: set[str]) -> None:
    wanted = {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "setup.py", "nbdzram/engine/pool.pyx"}
    wanted |= {"docs/design.md", "docs/images/folding.svg", "deploy/systemd/nbdzram.service"}
    wanted |= {"tests/conftest.py", "tools/environment"}
    assert wanted <= archive
    assert not [name for name in archive if name.endswith((".so", ".pyc", "-verify.state"))]
    assert not [name for name in archive if name.startswith("nbdzram/") and name.endswith(".c")]


def test_what_a_package_index_shows_leads_nowhere_that_is_not_there() -> None:
    """An index shows the text alone: no picture and no link of the tree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / project["readme"]).read_text()
    assert not [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]


def test_every_manual_page_goes_into_the_wheel() -> None:
    """`make wheel` writes them to where pyproject.toml looks for them."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    patterns = [pattern for several in files.values() for pattern in several]
    for name in manual.pages():
        assert any(fnmatch(str(manual.DIRECTORY / name), pattern) for pattern in patterns), name


def test_a_module_whose_source_is_gone_is_not_packed(tmp_path: Path) -> None:
    """pip builds in the tree, over what an earlier version left there; an old .so wins over a new .py of its name."""
    built = tmp_path / "lib"
    former = [built / "nbdzram/server/traffic.cpython-311-x86_64-linux-gnu.so", built / "nbdzram/server/former.py"]
    former[0].parent.mkdir(parents=True)
    for file in former:
        file.touch()
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path), "--build-lib", str(built)]
    environment = dict(os.environ) | {"NBDZRAM_COMPILE": "done", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert not [file for file in former if file.exists()]
    assert (built / "nbdzram/server/traffic.py").exists()
    assert list(built.glob("nbdzram/engine/pool.*.so"))


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_real_shell_completes_names_with_commas(
    serve: Callable[..., Nbdzram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """The names come from the running server, whole."""
    program = require_program(shell, package=shell)
    server = serve({"disk": "1M"})
    server.command_line("exports", "add", "a,b,c", "1M")
    script = tmp_path / "script"
    words = [sys.executable, "-m", "nbdzram", "completion", shell]
    script.write_text(
        subprocess.run(words, capture_output=True, text=True, check=True, env=server.environment()).stdout
    )
    starter = tmp_path / "bin" / "nbdzram"
    starter.parent.mkdir()
    starter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nbdzram "$@"\n')
    starter.chmod(0o755)
    asked = {
        "fish": f"source {script}; complete --do-complete 'nbdzram snapshot a'",
        "bash": f"source {script}; COMP_WORDS=(nbdzram snapshot a); COMP_CWORD=2; COMP_LINE='nbdzram snapshot a'; "
        "COMP_POINT=${#COMP_LINE}; _nbdzram_completion nbdzram; "
        "eval printf '%s' \"${COMPREPLY[*]}\"",  # words of a command line: a comma may be escaped in them
    }[shell]
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = server.environment() | {
        "PATH": f"{starter.parent}:{os.environ['PATH']}",
        "NBDZRAM_CONTROL": str(server.control),
    }
    done = subprocess.run(
        [program, "-c", asked], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.stdout.split() == ["a,b,c"], done.stderr
