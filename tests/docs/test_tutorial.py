"""The tutorial, pasted: its commands run in one shell, and what it shows is what they print."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.support.programs import require_program
from tests.support.server import free_port

TUTORIAL = ROOT / "docs" / "tutorial.md"
BUILD_SECONDS = 900  # what was changed since the last build, on a loaded machine; nothing when it is built
SECONDS = 240  # the whole of it, once it is built, there

pytestmark = pytest.mark.interop


def script_of(text: str, nbd_port: int, metrics_port: int) -> str:
    """The tutorial's bash blocks, on ports that are free here."""
    commands = "\n".join(block.content for block in blocks(text) if block.language == "bash")
    assert "127.0.0.1:10809" in commands
    return commands.replace("127.0.0.1:10809", f"127.0.0.1:{nbd_port}").replace(
        "127.0.0.1:9809", f"127.0.0.1:{metrics_port}"
    )


def environment(directory: Path, nbd_port: int, metrics_port: int) -> dict[str, str]:
    """A user's, with ports and a control socket of its own: a server that runs here stays undisturbed, and unasked."""
    runtime = directory / "run"
    runtime.mkdir(mode=0o700)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NBDZRAM_")}
    return kept | {
        "NBDZRAM_CONTROL": str(runtime / "nbdzram.sock"),
        "TMPDIR": str(directory),
        "NBDZRAM_LISTEN": f"127.0.0.1:{nbd_port}",
        "NBDZRAM_METRICS": f"127.0.0.1:{metrics_port}",
    }


def paste(script: str, directory: Path, nbd_port: int, metrics_port: int) -> str:
    """Run it in one shell that stops at the first failure; what it printed."""
    with subprocess.Popen(
        ["bash", "-e", "-o", "pipefail"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(directory, nbd_port, metrics_port),
        start_new_session=True,
    ) as shell:
        late = ""
        try:
            printed, _ = shell.communicate(script, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            late = f"not done within {SECONDS} s; "
            _end(shell.pid)
            printed, _ = shell.communicate()
        finally:
            _end(shell.pid)
    assert shell.returncode == 0, f"{late}exit code {shell.returncode}:\n{printed}"
    return printed


def _end(session: int) -> None:
    """End what the shell left behind, so that a failure leaves no server."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_the_tutorial_works_when_pasted(tmp_path: Path) -> None:
    """Every command succeeds, and each line shown appears, ports and the width of columns aside."""
    require_program("nbdcopy", package="libnbd-bin")
    require_program("mke2fs", package="e2fsprogs")
    if sys.prefix != str(ROOT / ".venv"):
        pytest.skip("the tutorial builds into .venv, which is not where these tests run")
    text = TUTORIAL.read_text(encoding="utf-8")
    # Ports are looked for behind what may take minutes: somebody else takes a free one meanwhile.
    subprocess.run(["make", "build"], cwd=ROOT, check=True, timeout=BUILD_SECONDS)
    nbd_port, metrics_port = free_port(), free_port()
    printed = paste(script_of(text, nbd_port, metrics_port), tmp_path, nbd_port, metrics_port)
    printed = printed.replace(f":{nbd_port}", ":10809").replace(f":{metrics_port}", ":9809")
    shown = [line for block in blocks(text) if block.language == "text" for line in block.content.splitlines()]
    assert shown
    words = " ".join(printed.split())
    assert [line for line in shown if " ".join(line.split()) not in words] == []
    merged = [int(number) for number in re.findall(r"objects merged (\d+)", printed)]
    assert len(merged) == 2, "a dry run, and the fold"
    assert merged[0] == merged[1] > 0
