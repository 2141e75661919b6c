"""QEMU's block layer: qemu-img convert and compare, qemu-io patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import require_program, run
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop


def test_qemu_img_converts_in_and_out_and_finds_them_equal(server: Nbdzram, ext4_image: Path, tmp_path: Path) -> None:
    """raw file -> export -> qcow2 file: QEMU's own comparison finds all three identical."""
    qemu_img = require_program("qemu-img", package="qemu-utils")
    copy = tmp_path / "copy.qcow2"
    run([qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", ext4_image, server.uri()])
    server.fold()
    run([qemu_img, "convert", "-f", "raw", "-O", "qcow2", server.tcp_uri(), copy])
    for image, driver in ((str(copy), "qcow2"), (server.uri(), "raw")):
        assert "identical" in run([qemu_img, "compare", "-f", "raw", "-F", driver, ext4_image, image])


def test_qemu_io_patterns_read_back(server: Nbdzram) -> None:
    """Writes, zeroes and discards that cross block boundaries leave exactly their bytes, before and after a fold."""
    qemu_io = require_program("qemu-io", package="qemu-utils")
    run(
        [
            *(qemu_io, "-f", "raw", server.uri()),
            *("-c", "write -P 0x11 0 1M"),
            *("-c", "write -P 0x22 4000 200"),
            *("-c", "write -P 0x33 65535 8194"),
            *("-c", "write -z 300000 100000"),
            *("-c", "write -z -u 512k 64k"),
            *("-c", "discard 768k 64k"),
            *("-c", "aio_write -P 0x44 900k 4k"),
            *("-c", "aio_write -P 0x44 904k 4k"),
            *("-c", "aio_flush"),
            *("-c", "flush"),
        ]
    )
    checks = [
        *("-c", "read -P 0x11 0 4000"),
        *("-c", "read -P 0x22 4000 200"),
        *("-c", "read -P 0x11 4200 61335"),
        *("-c", "read -P 0x33 65535 8194"),
        *("-c", "read -P 0x11 73729 226271"),
        *("-c", "read -P 0 300000 100000"),
        *("-c", "read -P 0x11 400000 124288"),
        *("-c", "read -P 0 512k 64k"),
        *("-c", "read -P 0 768k 64k"),
        *("-c", "read -P 0x44 900k 8k"),
        *("-c", "read -P 0x11 908k 116k"),
        *("-c", "read -P 0 1M 1M"),
    ]
    for _ in range(2):
        printed = run([qemu_io, "-f", "raw", server.uri(), *checks])
        assert "Pattern verification failed" not in printed, printed
        assert printed.count("read ") == len(checks) // 2
        server.fold()
