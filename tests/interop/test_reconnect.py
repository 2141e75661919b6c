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
RESTARTS = 8
WRITES_BETWEEN = 400
PIECE = 64 * KIB + 4096  # over what is done on the event loop: some of each burst are with the workers
DEPTH = 16
PATIENCE_SECONDS = 120


def writes_of(server: Nbdzram) -> int:
    with ControlClient(server.control) as control:
        return sum(export.operations["write"].requests for export in control.status().exports)


def bursts() -> bytes:
    """Commands of qemu-io: DEPTH writes at once and a flush, again and again, longer than the test lasts."""
    lines = []
    for number in range(20_000):
        place = number % 512 * 128 * KIB
        lines.append(f"aio_write -q -P {number % 251 + 1} {place} {PIECE}\n")
        if number % DEPTH == DEPTH - 1:
            lines.append("aio_flush\n")
    return "".join(lines).encode()


def test_qemu_with_reconnect_delay_sees_no_error_of_a_stopped_server(tmp_path: Path) -> None:
    """QEMU asks again for whatever was not answered; only an error reply would reach its guest."""
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
            for _ in range(RESTARTS):
                wait_for_writes(server, guest, WRITES_BETWEEN)
                server.stop()
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
