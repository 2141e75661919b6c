"""The yardsticks of `make bench-scaling` measure what they claim: the floor really stores and serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.floor import Floor
from tests.bench.measure import MIB
from tests.bench.scaling import SIZE, Load, loaded
from tests.support.programs import require_program, run

pytestmark = pytest.mark.interop


def test_the_floor_gives_back_what_was_written(tmp_path: Path, ext4_image: Path) -> None:
    """Over several connections, with requests that fit into a receive and such that do not."""
    nbdcopy = require_program("nbdcopy", package="libnbd-bin")
    with Floor(tmp_path, ext4_image.stat().st_size) as server:
        run([nbdcopy, "--allocated", ext4_image, server.uri()])
        for request_bytes in (4096, 32 << 10, MIB):
            back = tmp_path / f"back-{request_bytes}"
            run([nbdcopy, f"--request-size={request_bytes}", server.uri(), back])
            assert back.read_bytes() == ext4_image.read_bytes()
            run([nbdcopy, f"--request-size={request_bytes}", "--allocated", back, server.uri()])


def test_a_cell_counts_requests_and_processor_time(tmp_path: Path) -> None:
    with Floor(tmp_path, SIZE) as server:
        rate, processors, p99_us = loaded(server, Load("randread", "4k", 8), 2, 1)
    assert rate > 0
    assert processors > 0
    assert p99_us > 0
