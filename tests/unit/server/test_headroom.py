"""What is left of memory bounds pools before the kernel ends the process, and not much earlier."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdzram.config import MaintenanceConfig
from nbdzram.control.client import ControlClient
from nbdzram.engine.pool import Pool
from nbdzram.engine.purse import Purse
from nbdzram.errors import PoolFull
from nbdzram.machine import Machine
from nbdzram.server.headroom import RELIEF_SECONDS, Headroom, Relief
from nbdzram.server.maintenance import Maintenance
from nbdzram.server.pools import PoolService
from nbdzram.status import HeadroomStatus
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment, start
from tests.unit.engine.blocks import half_random, noise
from tests.unit.server.test_maintenance import CountingPool, Gate, ScriptedRun, waiting
from tests.unit.test_machine import Tree

__all__ = ["start"]
Start = Callable[..., Server]

MIB, GIB = 1 << 20, 1 << 30
LIMIT = 512 * MIB
KEPT = 64 * 4096  # beyond a ceiling, for what makes room
REQUESTS = 32 * MIB
RESERVE = 16 * MIB + REQUESTS  # of a cgroup of 512 MiB


WRITE = """
import sys
from pathlib import Path
from tests.support.nbd_client import Client
with Client(Path(sys.argv[1]), "disk") as client:
    client.write(0, bytes(range(256)) * 16)
print("written")
"""


@dataclass
class FakePurse:
    """What pools took together; `busy`: another 100 MiB after each time that somebody asks."""

    used_now: int = 60 * MIB
    ceiling: int = 0
    busy: Group | None = None

    @property
    def used(self) -> int:
        if self.busy is not None:
            self.busy.taken += 100 * MIB
        return self.used_now


@dataclass
class Group:
    """A memory cgroup of version 2 as files, in a machine with plenty."""

    tree: Tree
    limit: int = LIMIT
    _taken: int = 0
    dropped: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.tree.hierarchy("fs", "/a")
        self.write()

    @property
    def taken(self) -> int:
        return self._taken

    @taken.setter
    def taken(self, size: int) -> None:
        self._taken = size
        self.write()

    def write(self, stalled: str = "0.00") -> None:
        inactive, active = self.dropped
        self.tree.limit(
            "fs/a",
            memory__max=str(self.limit),
            memory__current=str(self._taken),
            memory__stat=f"anon {self._taken}\ninactive_file {inactive}\nactive_file {active}",
            memory__pressure=f"some avg10=99.00 avg60=0.00\nfull avg10={stalled} avg60=0.00 avg300=0.00 total=0",
        )


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(Tree(tmp_path))


def watching(group: Group, keep: int | None = None) -> tuple[Headroom, FakePurse]:
    headroom = Headroom(group.tree.machine, list, lambda: keep, REQUESTS)
    headroom.purse = purse = FakePurse()  # type: ignore[assignment]
    return headroom, purse


def short(headroom: Headroom) -> bool:
    headroom.look()
    assert headroom.status is not None
    return headroom.status.short


def test_pools_may_take_all_that_is_left_less_the_reserve(group: Group) -> None:
    group.taken = 100 * MIB
    headroom, purse = watching(group)
    headroom.look()
    assert purse.ceiling == 60 * MIB + LIMIT - 100 * MIB - RESERVE
    status = headroom.status
    assert status is not None
    assert (status.limit_bytes, status.free_bytes, status.reserve_bytes) == (LIMIT, LIMIT - 100 * MIB, RESERVE)
    assert status.whose.startswith("the cgroup ")


def test_what_pools_take_while_they_are_looked_at_counts_twice_and_not_never(group: Group) -> None:
    group.taken = 100 * MIB
    headroom, purse = watching(group)
    purse.busy = group
    headroom.look()
    assert group.taken == 200 * MIB
    assert purse.ceiling == 60 * MIB + LIMIT - 200 * MIB - RESERVE


def test_page_cache_that_can_be_dropped_is_left_and_half_of_what_was_used_again(group: Group) -> None:
    group.taken, group.dropped = LIMIT, (200 * MIB, 100 * MIB)
    group.write()
    (room,) = (one for one in group.tree.machine.rooms(group.tree.machine.memory_groups()) if one.share.cgroup)
    assert room.free == 250 * MIB


def test_version_1_tells_the_same_in_other_files(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.hierarchy("memory", "/b", controllers="memory")
    tree.limit(
        "memory/b",
        memory__limit_in_bytes=str(LIMIT),
        memory__usage_in_bytes=str(300 * MIB),
        memory__stat=f"inactive_file 1\ntotal_inactive_file {50 * MIB}\ntotal_active_file {20 * MIB}",
    )
    (room,) = (one for one in tree.machine.rooms(tree.machine.memory_groups()) if one.share.cgroup)
    assert (room.free, room.share.amount) == (LIMIT - 300 * MIB + 60 * MIB, LIMIT)


def test_the_machine_itself_counts_too() -> None:
    rooms = Machine().rooms([])
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert available
    assert [room.share.cgroup for room in rooms] == [None]
    assert abs(rooms[0].free - (int(available[1]) << 10)) < GIB
    assert rooms[0].share.amount > rooms[0].free > 0


def test_it_is_short_before_the_reserve_is_touched_and_until_half_of_it_is_left_again(group: Group) -> None:
    """While it is short no pool takes a page more."""
    headroom, purse = watching(group)
    for left, expected in ((RESERVE, False), (RESERVE // 8 - 1, True), (RESERVE // 2 - 1, True), (RESERVE // 2, False)):
        group.taken = LIMIT - RESERVE - left
        assert short(headroom) is expected, left
        assert purse.ceiling == purse.used + (0 if expected else left)
    assert headroom.status is not None
    assert headroom.status.shortages == 1
    group.taken = LIMIT + MIB
    assert short(headroom)
    assert (headroom.status.free_bytes, headroom.status.shortages, purse.ceiling) == (0, 2, purse.used)


def test_a_ceiling_is_never_taken_for_none(group: Group) -> None:
    headroom, purse = watching(group)
    group.taken, purse.used_now = LIMIT, 0
    headroom.look()
    assert purse.ceiling == 1


def test_stalls_make_it_short_where_little_is_left_and_not_elsewhere(group: Group) -> None:
    headroom, _ = watching(group)
    for left, stalled, expected in ((RESERVE - 1, "10.00", True), (2 * RESERVE, "99.00", False)):
        group._taken = LIMIT - RESERVE - left
        group.write(stalled)
        assert short(headroom) is expected


def test_of_several_limits_the_one_with_the_least_left_counts(tmp_path: Path) -> None:
    """Not the lowest: others fill the one above."""
    tree = Tree(tmp_path)
    tree.hierarchy("fs", "/above/own")
    tree.limit("fs/above", memory__max=str(GIB), memory__current=str(GIB - 100 * MIB))
    tree.limit("fs/above/own", memory__max=str(LIMIT), memory__current=str(100 * MIB))
    headroom = Headroom(tree.machine, list, lambda: None, REQUESTS)
    headroom.look()
    assert headroom.status is not None
    assert (headroom.status.limit_bytes, headroom.status.free_bytes) == (GIB, 100 * MIB)


def test_what_the_operator_wants_kept_free_is_kept_or_nothing(group: Group) -> None:
    headroom, purse = watching(group, keep=100 * MIB)
    headroom.look()
    assert purse.ceiling == 60 * MIB + LIMIT - 100 * MIB
    headroom, purse = watching(group, keep=0)
    purse.ceiling = 1
    headroom.look()
    assert (purse.ceiling, headroom.status) == (0, None)


def test_what_is_not_told_limits_nothing_and_that_is_said(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Below ProcSubset=pid there is no /proc/meminfo: every write was refused there. A cgroup still counts."""
    monkeypatch.setattr("nbdzram.machine.MEMINFO", tmp_path / "hidden")
    headroom, purse = watching(group)
    headroom.start()
    assert (short(headroom), caplog.text) == (False, "")
    headroom.stop()
    alone = Headroom(Machine(tmp_path / "nobody"), list, lambda: None, REQUESTS)
    alone.purse = purse  # type: ignore[assignment]
    alone.start()
    assert (purse.ceiling, alone.status) == (0, None)
    assert "how much memory is left is not told here" in caplog.text
    alone.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be shown less of /proc")
def test_a_server_that_is_not_shown_the_machines_memory_takes_writes() -> None:
    """A unit with ProcSubset=pid: no meminfo, nor what the kernel says of memory that is only reserved."""
    script = 'mount -t proc -o subset=pid proc /proc 2>/dev/null || { echo may not; exit; }; exec "$@"'
    words = [*NBDZRAM, "serve", "-e", "disk=1M", "--run", f"{sys.executable} -c {shlex.quote(WRITE)} $unixsocket"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "-", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean_environment(),
    )
    if "may not" in done.stdout or "Operation not permitted" in done.stderr:
        pytest.skip("may not mount here")
    assert (done.returncode, done.stdout) == (0, "written\n"), done.stderr


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(mem_limit=32 * MIB) as made:
        yield made


def taken_by(pool: Pool) -> int:
    return pool.stats().memory_used


def fill(pool: Pool, name: str) -> int:
    """Blocks that were taken of one export, until one was refused."""
    disk = pool.create(name, 64 * MIB)
    for block in range(64 * MIB // 4096):
        try:
            disk.write(block * 4096, noise(block))
        except PoolFull:
            return block
    raise AssertionError("it has no bounds")


def test_pools_together_are_held_to_a_ceiling_below_their_limits(pool: Pool) -> None:
    """Whoever needs it gets it: none has a part of its own."""
    purse = Purse()
    with Pool(mem_limit=32 * MIB) as other:
        for one in (pool, other):
            one.share(purse)
        assert purse.used == taken_by(pool) + taken_by(other)
        purse.ceiling = 24 * MIB
        taken = fill(pool, "first")
        assert 23 * MIB < purse.used <= 24 * MIB + KEPT
        other.create("second", MIB).trim(0, MIB)
        assert fill(other, "third") < 8
        assert pool.disks()[0].read(0, 4096) == noise(0)
        assert (pool.mem_limit, pool.stats().mem_limit) == (32 * MIB, 32 * MIB)
        pool.delete(pool.disks()[0])
        pool.stats()  # takes back what readers may have seen
        assert purse.used == taken_by(pool) + taken_by(other) < 4 * MIB
        assert fill(other, "fourth") > taken * 3 // 4
        purse.ceiling = 0
        assert fill(pool, "fifth") * 4096 > 28 * MIB, "the limit alone holds again"
        assert purse.used == taken_by(pool) + taken_by(other)
    assert purse.used == taken_by(pool), "a closed pool takes nothing"


def test_threads_of_several_pools_do_not_jump_a_ceiling_together() -> None:
    purse = Purse()
    pools = [Pool() for _ in range(4)]
    for one in pools:
        one.share(purse)
    purse.ceiling = 16 * MIB
    threads = [threading.Thread(target=fill, args=(one, "disk")) for one in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 15 * MIB < purse.used <= 16 * MIB + KEPT
    assert purse.used == sum(taken_by(one) for one in pools)
    for one in pools:
        one.close()


def test_a_limit_below_the_ceiling_is_the_limit(pool: Pool) -> None:
    pool.share(purse := Purse())
    purse.ceiling = 24 * MIB
    pool.mem_limit = 4 * MIB
    fill(pool, "first")
    assert taken_by(pool) <= 4 * MIB


def test_what_was_trimmed_can_be_written_again_at_a_ceiling_that_is_reached(pool: Pool) -> None:
    """Compaction has the pages that it needs, beside what writes may have."""
    pool.share(purse := Purse())
    purse.ceiling = 8 * MIB
    taken = fill(pool, "first")
    disk = pool.disks()[0]
    purse.ceiling = purse.used
    for block in range(0, taken, 2):
        disk.trim(block * 4096, 4096)
    for block in range(0, taken // 2, 2):
        disk.write(block * 4096, noise(taken + block))


def test_compaction_has_pages_beyond_a_ceiling_that_is_reached(pool: Pool) -> None:
    """Of each size class one zspage is left with one object: to move that into fewer pages takes one first."""
    pool.share(purse := Purse())
    disk = pool.create("disk", 64 * MIB)
    sizes, of_each = range(300, 1900, 100), 64
    for index, size in enumerate(sizes):
        for number in range(of_each):
            disk.write((index * of_each + number) * 4096, half_random(index * of_each + number, size))
    for index in range(len(sizes)):
        disk.trim((index * of_each + 1) * 4096, (of_each - 1) * 4096)
    pool.stats()  # takes back what readers may have seen
    purse.ceiling = purse.used
    for number in range(20):
        disk.write((8192 + number) * 4096, noise(number))


def test_every_pool_that_there_is_at_a_look_takes_from_the_purse(pool: Pool) -> None:
    pools = [pool]
    headroom = Headroom(Machine(), lambda: pools, lambda: None, REQUESTS)
    headroom.look()
    with Pool() as late:
        pools.append(late)
        headroom.look()
        assert pool.purse is late.purse is headroom.purse


def test_pools_fold_and_compact_at_once_when_memory_is_short_and_each_minute_while_it_is(
    group: Group, pool: Pool
) -> None:
    headroom, _ = watching(group)

    async def story() -> None:
        service = PoolService("default", pool, MaintenanceConfig(), now=0.0)
        relief = Relief(headroom, {"default": service})

        async def runs_at(now: float, *, short: bool) -> int:
            group.taken = LIMIT if short else 0
            headroom.look()
            relief.consider(now)
            await asyncio.gather(*relief._tasks)
            return len(service.maintenance.recent)

        assert await runs_at(0.0, short=False) == 0
        assert await runs_at(1.0, short=True) == 2
        assert await runs_at(RELIEF_SECONDS, short=True) == 2
        assert await runs_at(1.0 + RELIEF_SECONDS, short=True) == 4
        assert await runs_at(2.0 + RELIEF_SECONDS, short=False) == 4
        assert await runs_at(3.0 + RELIEF_SECONDS, short=True) == 6  # it was not, in between
        assert {(run.kind, run.reason) for run in service.maintenance.recent} == {
            ("fold", "memory_short"),
            ("compact", "memory_short"),
        }
        await service.maintenance.stop()

    asyncio.run(story())


def test_a_fold_that_is_cancelled_while_memory_is_short_keeps_no_pool_from_compacting(
    group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    headroom, _ = watching(group)
    gate = Gate()
    kinds = {"fold": lambda _: ScriptedRun(1 << 40, gate), "compact": lambda _: ScriptedRun(1, CountingPool)}

    async def story() -> None:
        maintenance = Maintenance("default", CountingPool(), kinds)
        relief = Relief(headroom, {"default": SimpleNamespace(maintenance=maintenance)})  # type: ignore[dict-item]
        group.taken = LIMIT
        headroom.look()
        relief.consider(0.0)
        fold = await waiting(maintenance, 1)
        await asyncio.to_thread(gate.begun.wait)
        await maintenance.cancel(fold)
        gate.open.set()
        await asyncio.gather(*relief._tasks)
        assert [(run.kind, run.state) for run in maintenance.recent] == [("fold", "cancelled"), ("compact", "done")]
        await maintenance.stop()

    asyncio.run(story())
    assert "while memory is short: " in caplog.text


def test_a_setting_of_nothing_kept_free_is_read_again(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text('[exports.disk]\nsize = "1M"\n')
    server = start("-c", str(file))

    def told() -> int | None:
        with ControlClient(server.control) as control:
            headroom = control.status().headroom
        return None if headroom is None else headroom.reserve_bytes

    assert (told() or 0) > 16 * MIB
    for keep, expected in (("40M", 40 * MIB), ("off", None)):
        file.write_text(f'[exports.disk]\nsize = "1M"\n[limits]\nkeep_free = "{keep}"\n')
        assert server.run("reload").code == 0
        deadline = time.monotonic() + 30
        while told() != expected:
            assert time.monotonic() < deadline


def test_each_figure_of_a_shortage_stands_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    status = HeadroomStatus("the machine", 7 * MIB, 5 * MIB, 3 * MIB, short=True, shortages=2)
    headroom = SimpleNamespace(status=status)
    relief = Relief(headroom, {})  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        relief.consider(0.0)
        relief.consider(1.0)
        headroom.status = replace(status, short=False)
        relief.consider(2.0)
    short, over = (record.getMessage() for record in caplog.records)
    assert short.startswith(
        "memory is short: 5M of 7M are left to the machine, and 3M are kept free (limits.keep_free)"
    )
    assert over == "memory is not short any more: 5M of 7M are left to the machine, of which 3M are kept free"
