"""Snapshots of all exports at one moment: all of them or none, whenever the server is killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.errors import UserError
from nbdzram.server import state as state_module
from nbdzram.server.service import Service
from tests.unit.server.house import (
    MIB,
    UNCHANGED,
    House,
)


def test_a_moment_gives_each_writable_export_a_snapshot_with_its_rules(tmp_path: Path) -> None:
    async def story() -> None:
        house = House(tmp_path)
        async with house.open() as changes:
            await changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ["10.0.0.0/8"]})
            await changes.add_export("frozen", MIB, pool=None, **{**UNCHANGED, "read_only": True})
            made = await changes.take_moment("monday")
            assert [export.name for export in made] == ["disk@monday"]
            assert (made[0].read_only, made[0].allow_addresses) == (True, ("10.0.0.0/8",))
            assert made[0].description == "snapshot of disk"
            with pytest.raises(UserError, match="there is an export 'disk@monday' already"):
                await changes.take_moment("monday")
        async with house.open():
            again = house.service._exports.get("disk@monday")
            assert (again.read_only, again.access.addresses) == (True, ("10.0.0.0/8",))

    uvloop.run(story())


def test_a_moment_that_cannot_be_remembered_leaves_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        house = House(tmp_path)
        async with house.open() as changes:
            await changes.add_export("other", MIB, pool=None, **UNCHANGED)

            def refuse(*_: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(state_module, "_replace", refuse)
            with pytest.raises(UserError, match="cannot remember the change"):
                await changes.take_moment("monday")
            assert sorted(export.name for export in house.service._exports) == ["disk", "other"]
            assert len(house.pool().all_disks()) == 2

    uvloop.run(story())


KILLED_IN_A_MOMENT = """
import asyncio, sys
from pathlib import Path
from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.engine.publish import kill_at_publish, moments_left
from nbdzram.server.service import Service

async def story():
    service = Service(ServerConfig(
        exports=tuple(ExportConfig(name=f"disk{n}", size_bytes=1 << 20) for n in range(3)),
        tcp=(), unix=(), state_dir=Path(sys.argv[1])))
    await service.start(listen=False)
    kill_at_publish(int(sys.argv[2]))
    await service.changes.take_moment("monday")
    print(moments_left(), flush=True)
    kill_at_publish(0)
    await service.stop()

asyncio.run(story())
"""


def test_a_server_killed_anywhere_in_a_moment_offers_all_its_snapshots_or_none(tmp_path: Path) -> None:
    outcomes = set()
    for kill_at in range(1, 1000):
        directory = tmp_path / str(kill_at)
        done = subprocess.run(
            [sys.executable, "-c", KILLED_IN_A_MOMENT, str(directory), str(kill_at)],
            capture_output=True,
            text=True,
            check=False,
        )

        async def look(directory: Path = directory) -> list[str]:
            service = Service(
                ServerConfig(
                    exports=tuple(ExportConfig(name=f"disk{n}", size_bytes=MIB) for n in range(3)),
                    tcp=(),
                    unix=(),
                    state_dir=directory,
                )
            )
            await service.start(listen=False)
            found = sorted(export.name for export in service._exports)
            pool = service._pools["default"].pool
            pool.check()
            assert len(pool.all_disks()) == len(found)
            await service.stop()
            return found

        copies = [name for name in asyncio.run(look()) if "@" in name]
        assert copies in ([], ["disk0@monday", "disk1@monday", "disk2@monday"]), kill_at
        outcomes.add(len(copies))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert outcomes == {0, 3}


def test_a_snapshot_that_is_resized_or_reset_is_other_content(tmp_path: Path) -> None:
    async def story() -> None:
        house = House(tmp_path)
        async with house.open() as changes:
            for name in ("one", "two", "three"):
                await changes.copy_export("disk", name, read_only=True)
                house.service._exports.get(name).disk.identify(5)
            await changes.resize_export("one", 16 * MIB, yes=False, force=False)
            await changes.reset_export("two", force=False)
            await changes.change_export("three", **{**UNCHANGED, "read_only": False})
            assert [house.service._exports.get(name).disk.identity for name in ("one", "two", "three")] == [0, 0, 0]

    uvloop.run(story())


def test_a_snapshot_whose_resizing_is_refused_is_what_it_was(tmp_path: Path) -> None:
    """What is sent since it can still be received."""

    async def story() -> None:
        house = House(tmp_path)
        async with house.open() as changes:
            await changes.copy_export("disk", "one", read_only=True)
            house.service._exports.get("one").disk.identify(5)
            with pytest.raises(UserError, match="destroys"):
                await changes.resize_export("one", MIB, yes=False, force=False)
            client = await house.client(b"one")
            with pytest.raises(UserError, match="attached"):
                await changes.resize_export("one", MIB, yes=True, force=False)
            await client.close()
            assert house.service._exports.get("one").disk.identity == 5

    uvloop.run(story())
