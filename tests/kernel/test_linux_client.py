"""A real Linux kernel as the client: nbd-client, ext4, folding while it works, fstrim, swap, detach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.guest.machine import run_guest
from tests.support.server import Nbdzram

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("connections", [1, 4])
def test_linux_keeps_a_file_system_and_swap_on_a_disk_that_folds_meanwhile(tmp_path: Path, connections: int) -> None:
    """Everything that the guest wrote comes back while the host folds and compacts, and its kernel logs no error."""
    asked: list[str] = []
    with Nbdzram(tmp_path, {"disk": "256M"}) as server:

        def fold() -> None:
            server.fold()
            asked.append("fold")

        def compact() -> None:
            server.compact()
            asked.append("compact")

        assert server.port is not None
        console = run_guest(
            tmp_path, port=server.port, connections=connections, actions={"fold": fold, "compact": compact}
        )
        assert "PASS:" in console, console
        assert asked == ["fold", "fold", "fold", "compact", "fold"]
        pages_folded = server.mm_stat()[9]
        assert pages_folded > 0, "the guest wrote every file several times, and nothing folded"
