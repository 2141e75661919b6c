"""A real Linux kernel as the client: nbd-client, ext4, folding while it works, fstrim, swap, detach."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

    def __init__(self, directory: Path, port: int, size: str = "128M", arguments: Sequence[str] = ()) -> None:
        self.wanted = str(port)
        super().__init__(directory, {"disk": size}, arguments=["--state-dir", str(directory / "state"), *arguments])

    def environment(self) -> dict[str, str]:
        self.command[self.command.index("-p") + 1] = self.wanted
        return super().environment()


@pytest.mark.parametrize("restarts", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kept_disk_outlives_servers_that_are_killed_and_stopped_under_load(tmp_path: Path, restarts: int) -> None:
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
        console = run_guest(tmp_path, port=port, actions=actions, work="persist", arguments={"restarts": restarts})
        print(console)
        assert "PASS:" in console, console
        assert ends == ["kill", "stop"] * restarts + ["kill", "kill"]
    finally:
        servers[-1].stop()


SWAP_SECONDS = int(os.environ.get("NBDZRAM_TEST_SWAP_SECONDS", "300"))
"""How long a guest lives from swap. An hour, 3600, is what says something about a machine under pressure for good."""
SWAPPED_MIB = 300


@pytest.mark.slow
@pytest.mark.parametrize(("memory_mib", "group_mib"), [(512, "100"), (256, "")], ids=["group", "machine"])
def test_a_guest_lives_from_swap_while_it_folds_and_its_server_is_restarted(
    tmp_path: Path, memory_mib: int, group_mib: str
) -> None:
    """No page comes back wrong and nothing hangs, though most pages are out and the server goes away twice.

    Once memory is short in a control group alone; once in the whole machine, so that whatever keeps the device attached
    must need no page of anybody's who waits for it.
    """
    port = free_port()
    begin = partial(OnPort, tmp_path, port, "1G", ["--swap"])
    servers = [begin()]
    ends: list[str] = []
    folded: list[int] = []

    def start_anew(how: str) -> None:
        getattr(servers[-1], how)()
        servers.append(begin())
        ends.append(how)

    def fold() -> None:
        servers[-1].fold()
        folded.append(servers[-1].mm_stat()[9])

    actions: dict[str, Callable[[], object]] = {
        "fold": fold,
        **{how: partial(start_anew, how) for how in ("kill", "stop")},
    }
    arguments = {"seconds": SWAP_SECONDS, "swapped": SWAPPED_MIB, "group": group_mib}
    try:
        console = run_guest(
            tmp_path, port=port, actions=actions, work="swap", arguments=arguments, memory_mib=memory_mib
        )
        print(console, f"pages folded at each fold: {folded}", sep="\n")
        assert "PASS:" in console, console
        assert ends == ["stop", "kill"]
        # Each server counts its own, and its first fold may come before the guest wrote anything new out.
        assert max(folded) > 0, "a guest whose every fourth page has twins, and nothing folded"
    finally:
        servers[-1].stop()
