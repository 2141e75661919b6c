"""Large requests, of the sizes that real clients send: 1 to 4 MiB; and streams."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

MIB = 1 << 20
PAGES = MIB // 4096


@pytest.mark.parametrize("mebibytes", [1, 2, 4])
def test_what_large_writes_arrive_in_is_not_made_of_fresh_pages_each_time(tmp_path: Path, mebibytes: int) -> None:
    """Four tenths of what a write of 1 MiB cost went there: the buffer is freed, and the C library gave it back."""
    content = bytes(mebibytes * MIB)  # of which nothing is stored
    with Nbdzram(tmp_path, {"disk": "64M"}) as server, server.client() as client:
        for _ in range(8):
            client.write(0, content)
        before = server.fresh_pages()
        for _ in range(16):
            client.write(0, content)
        assert server.fresh_pages() - before < 8 * mebibytes * PAGES, "half of what one each needs"


def test_the_records_of_a_stream_are_not_made_of_fresh_pages_each_time(tmp_path: Path) -> None:
    """Two thirds of what it cost to send one went there: each record was a mapping, of which each page was new."""
    sending = [sys.executable, "-m", "nbdzram", "send", "disk", "--control"]
    with Nbdzram(tmp_path, {"disk": "64M"}) as server:
        with server.client() as client:
            for number in range(16):
                client.write(number * MIB, random.Random(number).randbytes(MIB))
        spent = []
        for _ in range(2):
            before = server.fresh_pages()
            done = subprocess.run(
                [*sending, str(server.control)], capture_output=True, check=True, env=server.environment()
            )
            assert len(done.stdout) > 16 * MIB
            spent.append(server.fresh_pages() - before)
    assert spent[-1] < 2 * PAGES, "an eighth of what it is long"
