"""Who asks to take over waits for the server that agreed, and for nobody else."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.cli.takeover import _accept

CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(2)
        yield listening


def test_a_stranger_who_connects_is_hung_up_on_and_the_server_is_waited_for(listener: socket.socket) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", CONNECT, listener.getsockname()]) as stranger,
        socket.socket(socket.AF_UNIX) as server,
    ):
        assert select.select([listener], (), ())[0]  # the stranger is there, and first
        server.connect(listener.getsockname())
        with _accept(listener, os.getpid()) as giver:
            server.send(b"x")
            assert giver.recv(1) == b"x"
        assert stranger.wait() == 0
