"""A server that starts has not opened its disks: nobody is told that there are none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable, UserError
from tests.unit.cli.conftest import NBDZRAM, clean_environment, run

STARTS = "the server is starting, and has not opened all of its disks yet"


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Path]:
    """Of a server that reads a pipe that nobody writes to."""
    control, stream = tmp_path / "c.sock", tmp_path / "stream"
    os.mkfifo(stream)
    words = ["serve", "-e", "disk=1M", "-e", "two=1M", "--restore", str(stream), "-U", str(tmp_path / "n.sock")]
    server = subprocess.Popen(
        [*NBDZRAM, *words, "--control", str(control), "--metrics", "off"],
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    try:
        while not answers(control):
            assert server.poll() is None
        yield control
    finally:
        server.terminate()
        _, told = server.communicate(timeout=60)
        assert b"Traceback" not in told


def answers(control: Path) -> bool:
    try:
        with ControlClient(control) as client:
            return client.status().starting and bool(client.status().pools)
    except ServerUnreachable:
        return False


def test_nobody_is_told_that_a_disk_is_not_there_which_is_not_opened_yet(control: Path) -> None:
    """`rm a b` ended with 4, as if they had gone already, and `check` had looked at everything."""
    for words in (
        ("stat", "disk"),
        ("rm", "--force", "disk", "two"),
        ("attach", "disk"),
        ("clients", "list", "--export", "disk"),
    ):
        done = run(*words, "--control", str(control))
        assert (done.code, STARTS in done.err) == (1, True), done
    listed = run("ls", "--control", str(control))
    assert (listed.code, f"nbdzram: warning: {STARTS}" in listed.err) == (0, True), listed
    with ControlClient(control) as client:
        asked: tuple[tuple[str, dict[str, Any]], ...] = (
            ("run", {"kind": "check"}),
            ("reload", {}),
            ("pools.lose", {"name": "default"}),
            ("exports.remove", {"name": "disk"}),
        )
        for method, params in asked:
            with pytest.raises(UserError, match=STARTS):
                client.call(method, **params)
