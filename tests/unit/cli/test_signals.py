"""What signals do: one drains, the second ends at once, and SIGHUP ends nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable

from nbdzram.control.client import ControlClient
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment
from tests.wire import CMD_DISC, CMD_READ, OPT_GO, client_hello, name_and_infos, option, request

Start = Callable[..., Server]
FORCED_EXIT = 128 + signal.SIGTERM


def test_a_server_that_drains_is_not_healthy_and_a_second_sigterm_ends_it(start: Start) -> None:
    """A client that asked for much and reads nothing keeps the drain going."""
    server = start("-e", "disk=64M")
    client = Client(server.socket, "disk")
    with client.socket:
        client.send(CMD_READ, 0, 32 << 20)
        client.socket.recv(1)  # it is being answered
        server.process.send_signal(signal.SIGTERM)
        with ControlClient(server.control) as control:
            while not control.status().draining:
                os.sched_yield()
        health = [*NBDZRAM, "health", "--control", str(server.control)]
        told = subprocess.run(health, capture_output=True, text=True, env=clean_environment(), check=False)
        assert (told.returncode, "drains" in told.stderr) == (1, True), told.stderr
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=60)
        assert server.process.returncode == FORCED_EXIT


def test_sighup_ends_no_server_on_standard_input() -> None:
    """inetd's children live with their parent's signals; there is nothing to read again, and nobody to lose a disk."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Whoever runs the tests may ignore it, as nohup does, and then the server would too.
        command = ["env", "--default-signal=HUP", *NBDZRAM, "serve", "--stdin", "-e", "disk=1M"]
        process = subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.PIPE, env=clean_environment())
        theirs.close()
        assert process.stderr is not None
        ours.settimeout(60)
        ours.sendall(client_hello() + option(OPT_GO, name_and_infos(b"disk")))
        assert ours.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
        process.send_signal(signal.SIGHUP)
        assert ours.recv(20 + 12 + 20, socket.MSG_WAITALL)
        ours.sendall(request(CMD_READ, 0, 512, cookie=1))
        assert len(ours.recv(16 + 512, socket.MSG_WAITALL)) == 16 + 512
        ours.sendall(request(CMD_DISC, 0, 0, cookie=2))
        _, complaints = process.communicate(timeout=60)
        assert (process.returncode, b"Traceback" in complaints) == (0, False), complaints
