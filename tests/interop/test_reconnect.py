"""Clients that connect again: a restart of the server is a pause for them, and never an I/O error."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from tests.support.programs import require_program
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

KIB, MIB = 1 << 10, 1 << 20
WRITES_BETWEEN = 400
PIECE = 64 * KIB + 4096  # over what is done on the event loop: some of each burst are with the workers
DEPTH = 16
WRITES_MOST = 60_000  # more than are made between so many restarts
PATIENCE_SECONDS = 120


def writes_of(server: Nbdzram) -> int:
    with ControlClient(server.control) as control:
        return sum(export.operations["write"].requests for export in control.status().exports)


def bursts() -> bytes:
    """Commands of qemu-io: DEPTH writes at once, a flush, and a look at what they wrote, longer than the test lasts."""
    lines: list[str] = []
    for first in range(0, WRITES_MOST, DEPTH):
        burst = [
            f"-q -P {number % 251 + 1} {number % 512 * 128 * KIB} {PIECE}\n" for number in range(first, first + DEPTH)
        ]
        lines += [f"aio_write {what}" for what in burst]
        lines.append("aio_flush\n")
        lines += [f"read {what}" for what in burst]
    return "".join(lines).encode()


@pytest.mark.parametrize("restarts", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_qemu_with_reconnect_delay_sees_no_error_of_a_server_that_is_stopped_or_killed(
    tmp_path: Path, restarts: int
) -> None:
    """QEMU asks again for whatever was not answered; only an error reply would reach its guest. What was answered is
    there: the guest reads it back, before and behind each restart."""
    qemu_io = require_program("qemu-io", package="qemu-utils")
    commands = tmp_path / "commands"
    commands.write_bytes(bursts())
    printed = tmp_path / "printed"
    arguments = ("--state-dir", str(tmp_path / "state"))
    server = Nbdzram(tmp_path, {"disk": 64 * MIB + MIB}, arguments=arguments)
    image = (
        f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={server.unix_path},"
        "file.export=disk,file.reconnect-delay=60"
    )
    with commands.open("rb") as given, printed.open("wb") as output:
        guest = subprocess.Popen([qemu_io, "--image-opts", image], stdin=given, stdout=output, stderr=output)
        try:
            for end in (Nbdzram.stop, Nbdzram.kill) * restarts:
                wait_for_writes(server, guest, WRITES_BETWEEN)
                end(server)
                server = Nbdzram(tmp_path, {"disk": 64 * MIB + MIB}, arguments=arguments)
            wait_for_writes(server, guest, WRITES_BETWEEN)
            assert "failed" not in printed.read_text()
        finally:
            guest.kill()
            guest.wait()
            server.stop()


def wait_for_writes(server: Nbdzram, guest: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while writes_of(server) < count:
        assert guest.poll() is None, "the guest ended too early"
        assert time.monotonic() < deadline, f"{writes_of(server)} of {count} writes came"
