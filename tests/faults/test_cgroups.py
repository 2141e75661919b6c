"""In a control group the server lives by the group's limits: what is too much is refused, and nothing is killed."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdzram.machine import Machine
from tests.support.cgroup import cgroup, inside, oom_kills, run_inside, set_limit
from tests.support.nbd_client import Client, RequestFailed
from tests.support.server import Nbdzram
from tests.support.takeover import Line
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


class Writer(threading.Thread):
    """Writes noise from `start` on until it is refused, and can say what it wrote."""

    def __init__(self, client: Client, number: int) -> None:
        super().__init__()
        self.client = client
        self.number = number
        self.start_at = number * (1 << 30)
        self.written = 0
        self.error: int | None = None

    def piece(self, index: int) -> bytes:
        return random.Random(self.number << 32 | index).randbytes(MIB)

    def run(self) -> None:
        try:
            while self.written < 1 << 30:
                self.client.write(self.start_at + self.written, self.piece(self.written // MIB))
                self.written += MIB
        except RequestFailed as refused:
            self.error = refused.error

    def reads_back(self, offset: int) -> bool:
        return self.client.read(self.start_at + offset, MIB) == self.piece(offset // MIB)


def test_writers_of_eight_times_the_cgroup_are_refused_and_read_on_and_nothing_is_killed(tmp_path: Path) -> None:
    """Pools without any limit, four writers at once, folds and compactions beside them; and room again after a trim."""
    with (
        cgroup("memory", ROOM) as cage,
        Caged(tmp_path, {"disk": "4G"}, cage, ["--pool", "other"]) as server,
        ExitStack() as stack,
    ):
        writers = [Writer(stack.enter_context(server.client()), number) for number in range(4)]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            server.command_line("fold")
            server.command_line("compact")
        assert [writer.error for writer in writers] == [errno.ENOSPC] * 4
        assert sum(writer.written for writer in writers) > ROOM // 2, "it was refused much too early"
        assert server.process.poll() is None
        assert oom_kills(cage) == 0
        for writer in writers:
            assert all(writer.reads_back(offset) for offset in range(0, writer.written, 8 * MIB))
        server.wait_until(lambda: "memory is short: " in server.log, 30)
        server.wait_until(lambda: "memory_short" in server.command_line("runs", "--json").stdout, 30)
        first = writers[0]
        first.client.trim(first.start_at, first.written)
        server.wait_until(lambda: "memory is not short any more" in server.log, 30)
        first.client.write(first.start_at, first.piece(0))
        assert first.reads_back(0)


def test_who_takes_over_where_memory_does_not_suffice_is_ended_before_who_serves(tmp_path: Path) -> None:
    """The kernel would end the larger, and its disks with it. With room the next one goes on, and goes last again."""
    stored = [random.Random(offset).randbytes(MIB) for offset in range(0, 64 * MIB, MIB)]
    with cgroup("memory", ROOM) as cage, ExitStack() as stack:
        line = Line(tmp_path, in_memory=True, behind=inside(cage, []))
        old = line.last
        stack.callback(old.kill)
        score = Path(f"/proc/{old.pid}/oom_score_adj").read_text()
        client = old.client()
        stack.enter_context(client.socket)
        for index, block in enumerate(stored):
            client.write(index * MIB, block)
        set_limit(cage, "memory", unreclaimable_bytes(old.pid) + 12 * MIB)  # enough for Python, not for a server
        with pytest.raises(AssertionError, match=f"ended with -{signal.SIGKILL}"):
            line.take_over()
        assert oom_kills(cage) == 1
        assert [client.read(index * MIB, MIB) for index in range(len(stored))] == stored
        set_limit(cage, "memory", ROOM)
        stack.callback(line.take_over().kill)
        assert [client.read(index * MIB, MIB) for index in range(len(stored))] == stored
        assert line.attached() == 1
        assert Path(f"/proc/{line.last.pid}/oom_score_adj").read_text() == score


def unreclaimable_bytes(pid: int) -> int:
    """What of a process's memory the kernel cannot drop, where there is no swap."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE))


def test_a_server_without_a_limit_in_a_cgroup_is_warned_of(tmp_path: Path) -> None:
    with cgroup("memory", ROOM) as cage, Caged(tmp_path, {"disk": "1M"}, cage, []) as server:
        assert "the pool 'default' has no limit, and the cgroup" in server.log


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_too_few_tasks_for_its_threads_are_one_sentence(tasks: int, tmp_path: Path) -> None:
    """Not even one that writes the log, or none that serves."""
    with cgroup("pids", tasks) as cage:
        done = run_inside(cage, [*NBDZRAM, "serve", "-e", "d=1M", "-U", tmp_path / "n", "--control", tmp_path / "c"])
    assert done.returncode == 1
    assert done.stderr.startswith("nbdzram: cannot start the threads")
    assert f"allows {tasks} tasks; raise TasksMax=" in done.stderr
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
