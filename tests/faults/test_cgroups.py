"""In a control group the server lives by the group's limits: what is too much is refused, and nothing is killed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nbdzram.machine import Machine
from tests.support.cgroup import cgroup, inside, run_inside
from tests.support.nbd_client import RequestFailed
from tests.support.server import Nbdzram
from tests.unit.cli.conftest import NBDZRAM

MIB = 1 << 20
ROOM = 512 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="control groups are made by root")


class Caged(Nbdzram):
    """A server that starts as a member of a control group."""

    def __init__(self, directory: Path, exports: Mapping[str, str | int], cage: Path, arguments: Sequence[str]) -> None:
        self.cage = cage
        super().__init__(directory, exports, arguments=arguments)

    def environment(self) -> dict[str, str]:
        if self.command[0] != "sh":
            self.command[:] = inside(self.cage, self.command)
        return super().environment()


def test_half_of_the_memory_is_half_of_the_cgroups_and_a_full_disk_is_enospc(tmp_path: Path) -> None:
    """Filled with what does not compress, the server refuses a write long before the kernel would end it."""
    noise = random.Random(22)
    with cgroup("memory", ROOM) as cage, Caged(tmp_path, {"disk": "2G"}, cage, ["--mem-limit", "50%"]) as server:
        assert server.mm_stat()[3] <= ROOM // 2
        with server.client() as client, pytest.raises(RequestFailed) as refused:
            for offset in range(0, 2 * ROOM, MIB):
                client.write(offset, noise.randbytes(MIB))
        assert refused.value.error == errno.ENOSPC
        assert server.process.poll() is None


def test_a_server_without_a_limit_in_a_cgroup_is_warned_of(tmp_path: Path) -> None:
    with cgroup("memory", ROOM) as cage, Caged(tmp_path, {"disk": "1M"}, cage, []) as server:
        assert "the pool 'default' has no limit, and the cgroup" in server.log


def test_too_few_tasks_for_its_threads_are_one_sentence(tmp_path: Path) -> None:
    with cgroup("pids", 2) as cage:
        done = run_inside(cage, [*NBDZRAM, "serve", "-e", "d=1M", "-U", tmp_path / "n", "--control", tmp_path / "c"])
    assert done.returncode == 1
    assert done.stderr.startswith("nbdzram: cannot start the threads")
    assert "allows 2 tasks; raise TasksMax=" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_quota_of_processors_is_seen_from_inside() -> None:
    """As the kernel writes it, not as a test makes it up."""
    group = Path("/sys/fs/cgroup/cpu") / f"nbdzram-test-{os.getpid()}"
    if not group.parent.is_dir():
        pytest.skip("no version 1 hierarchy of cpu here")
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        told = run_inside(
            group, [NBDZRAM[0], "-c", "from nbdzram.machine import Machine; print(Machine().processors())"]
        )
    finally:
        group.rmdir()
    assert told.stdout.strip() == "1", told.stderr
    assert Machine().processors() <= (os.cpu_count() or 1)
