"""A real Linux kernel as the client: nbd-client, ext4, folding while it works, fstrim, swap, detach."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.kernel.guest.machine import run_guest
from tests.support.server import Nbdzram, free_port

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


class OnPort(Nbdzram):
    """A server that comes back where the one before it listened."""

    def __init__(self, directory: Path, port: int) -> None:
        self.wanted = str(port)
        super().__init__(directory, {"disk": "128M"}, arguments=["--state-dir", str(directory / "state")])

    def environment(self) -> dict[str, str]:
        self.command[self.command.index("-p") + 1] = self.wanted
        return super().environment()


def test_a_kept_disk_outlives_servers_that_are_killed_and_stopped_under_load(tmp_path: Path) -> None:
    """No error reaches the guest, whose file system is written all the while; nor when its keeper is killed as well."""
    port = free_port()
    servers = [OnPort(tmp_path, port)]
    ends: list[str] = []

    def start_anew(how: str) -> None:
        ends.append(how)
        getattr(servers[-1], how)()
        servers.append(OnPort(tmp_path, port))

    actions = {how: partial(start_anew, how) for how in ("kill", "stop")}
    try:
        console = run_guest(tmp_path, port=port, actions=actions, persist=True)
        assert "PASS:" in console, console
        assert ends == ["kill", "stop", "kill", "kill"]
    finally:
        servers[-1].stop()
