"""Completion in real shells, over names that mean something to a shell."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import require_program
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment

Start = Callable[..., Server]

SHELL_SECONDS = 120


def type_in_bash(keys: list[str], *, control: Path, directory: Path) -> str:
    """Type these lines in an interactive bash that has the completion, and return what its terminal showed."""
    program = directory / "nbdzram"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(NBDZRAM)} "$@"\n')
    program.chmod(0o755)
    script = directory / "completion"
    script.write_text(
        subprocess.run([program, "completion", "bash"], capture_output=True, text=True, check=True).stdout
    )
    environment = clean_environment()
    environment |= {"PATH": f"{directory}:{environment['PATH']}", "NBDZRAM_CONTROL": str(control), "LC_ALL": "C.UTF-8"}
    environment |= {"INPUTRC": "/dev/null", "TERM": "dumb", "PS1": "$ "}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 300))  # so that no line is broken
    command = [require_program("bash", package="bash"), "--norc", "-i"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=directory, start_new_session=True
    ) as shell:
        os.close(theirs)
        os.write(ours, "".join(f"{line}\n" for line in (f"source {script}", *keys, "exit 0")).encode())
        shown = bytearray()
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # its end, on Linux
            pass
        finally:
            os.close(ours)
        assert shell.wait(SHELL_SECONDS) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("a", "a b"),
        ('"q', "q r"),
        ("e", "e'f"),
        ("g", 'g"h'),
        (r"\$", "$x"),
        ("b", r"back\slash"),
        ("c", "c,d"),
        ("s", "s*"),
        ("disk@m", "disk@monday"),
        ("disk@t:", "disk@t:1"),
        ("ü", "über"),
    ],
)
def test_bash_completes_a_name_to_a_word_that_is_that_name(start: Start, tmp_path: Path, typed: str, name: str) -> None:
    """Blanks, quotes and dollars were left to the shell, and what stood behind an @ was completed to nothing."""
    server = start("-e", "disk=1M")
    for one in (name, "zz"):
        server.run("exports", "add", one, "1M")
    (tmp_path / "star").touch()
    shown = type_in_bash([f"nbdzram exports remove --dry-run {typed}\t"], control=server.control, directory=tmp_path)
    assert f"to remove {name} destroys nothing that is stored" in shown, shown


def test_bash_completes_commands_options_values_and_files(start: Start, tmp_path: Path) -> None:
    server = start("-e", "disk=1M")
    (tmp_path / "image.raw").write_bytes(b"a" * 8192)
    (tmp_path / "place").mkdir()
    keys = ["nbdzram est\timage.r\t", "nbdzram exports li\t--js\t", "nbdzram serve --tls=of\t --check-con\t"]
    keys.append("nbdzram serve -e d=1M --fold-interval a\t--tls-k\timage.r\t--state-d\tpl\t --check-config")
    keys += ["nbdzram stat -n -b -o DISKS\t disk", "nbdzram stat -n -b --output=NAME,DATA,DISKS\t disk"]
    shown = type_in_bash(keys, control=server.control, directory=tmp_path)
    assert "2 blocks: 2 same-filled" in shown, shown
    assert '"name": "disk"' in shown
    assert "nbdzram serve --tls=off  --check-config" in shown
    assert "stat -n -b -o DISKSIZE  disk\r\n1048576" in shown
    assert "stat -n -b --output=NAME,DATA,DISKSIZE  disk\r\ndisk 0 1048576" in shown
    assert "nbdzram serve -e d=1M --fold-interval auto --tls-key image.raw --state-dir place/" in shown
