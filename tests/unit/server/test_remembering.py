"""A change is remembered before it is made: without room, where the engine refuses, and killed between the two."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig
from nbdzram.errors import PoolFull, UserError
from nbdzram.server import state as state_module
from nbdzram.server.state import State
from tests.unit.server.house import (
    GATE_SECONDS,
    MIB,
    UNCHANGED,
    Delegate,
    Gate,
    House,
    gate_disk,
    tell,
)


def block_the_state(house: House) -> Path:
    """From now on nothing can be remembered."""
    obstacle = house.state_dir / "changes.new"
    obstacle.mkdir()
    return obstacle


def test_a_change_that_cannot_be_remembered_is_not_made(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            block_the_state(house)
            for change in (
                changes.resize_export("disk", 16 * MIB, yes=False, force=False),
                changes.resize_export("disk", MIB, yes=True, force=False),
                changes.add_export("other", MIB, pool=None, **UNCHANGED),
                changes.copy_export("disk", "other", read_only=False),
                changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)}),
                changes.add_pool("fast", 0, "fold"),
                changes.change_pool("default", 64 * MIB, None),
            ):
                with pytest.raises(UserError, match="cannot remember the change"):
                    await change
            found = house.found()
            assert (found.size_bytes, found.admits) == (8 * MIB, "everyone")
            assert [export.name for export in house.service.status().exports] == ["disk"]
            assert [(pool.name, pool.stats.mem_limit) for pool in house.service.status().pools] == [("default", 0)]
            assert not (house.state_dir / "fast.pool").exists()

    tell(story())


def test_a_removal_needs_no_room(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.exports += (ExportConfig(name="two", size_bytes=MIB),)

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("added", MIB, pool=None, **UNCHANGED)
            await changes.add_pool("fast", 0, "fold")
            obstacle = block_the_state(house)
            await changes.remove_export("added", force=False)
            await changes.remove_export("disk", force=False)
            assert "the next start makes it again, empty" in caplog.text
            await changes.remove_pool("fast")
            assert not (house.state_dir / "fast.pool").exists()
            assert [export.name for export in house.service.status().exports] == ["two"]
            real = changes._pools["default"].pool.delete

            def frees_room(disk: Any) -> None:
                real(disk)
                obstacle.rmdir()

            changes._pools["default"].pool = Delegate(changes._pools["default"].pool, delete=frees_room)
            await changes.remove_export("two", force=False)
            assert house.remembered()["two"]["removed"]
        house.exports = house.exports[1:]
        async with house.open():
            assert house.service.status().exports == ()

    tell(story())


@pytest.mark.parametrize("error", [UserError, PoolFull])
def test_what_was_remembered_for_a_change_that_failed_is_undone(
    house: House, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            before = house.remembered()

            def refuses(*_: Any, **__: Any) -> None:
                raise error("the directory is full")

            with monkeypatch.context() as patched, pytest.raises(UserError, match="directory is full"):
                patched.setattr("nbdzram.server.pool_changes.open_pool", refuses)
                await changes.add_pool("fast", 0, "fold")
            assert State(house.state_dir).changes.pools == {}

            service = changes._pools["default"]
            pool, service.pool = service.pool, Delegate(service.pool, create=refuses, clone=refuses)
            for change in (
                changes.add_export("other", MIB, pool=None, **UNCHANGED),
                changes.copy_export("disk", "other", read_only=False),
            ):
                with pytest.raises(UserError, match="directory is full"):
                    await change
                assert house.remembered() == before
            service.pool = pool
            export = house.service._exports.get("disk")
            disk, export.disk = export.disk, Delegate(export.disk, resize=refuses)  # type: ignore[assignment]
            with pytest.raises(UserError, match="directory is full"):
                await changes.resize_export("disk", 16 * MIB, yes=False, force=False)
            assert house.remembered() == before
            export.disk = disk

    tell(story())


def test_what_the_engine_refuses_is_a_refusal_and_no_bug(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            before = house.remembered()

            def full(_: int) -> None:
                raise PoolFull("the pool is at its memory limit")

            export = house.service._exports.get("disk")
            disk, export.disk = export.disk, Delegate(export.disk, resize=full)  # type: ignore[assignment]
            with pytest.raises(UserError, match="the engine refuses: the pool is at its memory limit"):
                await changes.resize_export("disk", MIB, yes=True, force=False)
            assert house.remembered() == before
            export.disk = disk
            await (await house.client()).close()  # and the export is open again

    tell(story())


@pytest.mark.parametrize(
    "words",
    [
        ("exports", "add", "other", "1M"),
        ("exports", "resize", "disk", "16M"),
        ("exports", "resize", "disk", "1M", "--yes"),
        ("exports", "remove", "disk", "--yes"),
        ("exports", "change", "disk", "--allow-address", "10.0.0.0/8"),
        ("exports", "rename", "disk", "other"),
        ("clone", "disk", "other"),
        ("pools", "add", "fast"),
    ],
    ids=" ".join,
)
def test_a_server_killed_between_remembering_and_making_starts(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Killed in the thread that has just renamed the state file. What it tells then: test_inventory."""
    code = """
import os, signal, sys
from nbdzram.server import state
real = state._replace
def replace(path, text):
    real(path, text)
    if os.path.exists(sys.argv[-1] + ".armed"):
        os.kill(os.getpid(), signal.SIGKILL)
state._replace = replace
sys.argv, marker = sys.argv[:-1], sys.argv[-1]
sys.argv.append(marker)
from nbdzram.cli.main import run
sys.exit(run(sys.argv[1:-1]))
"""
    marker = tmp_path / "marker"
    control, socket_path = tmp_path / "c.sock", tmp_path / "n.sock"
    serve = ["serve", "-e", "disk=8M", "-U", str(socket_path), "--control", str(control), "--metrics", "off"]
    serve += ["--state-dir", str(tmp_path / "state")]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *serve, str(marker)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "qemu-img" in line or "there is no disk yet" in line:
                return process
        raise AssertionError("".join(said))

    first = start()
    Path(f"{marker}.armed").touch()
    command = [sys.executable, "-m", "nbdzram", *words, "--control", str(control)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 3  # it went away
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    Path(f"{marker}.armed").unlink()
    second = start()
    second.terminate()
    second.communicate(timeout=60)
    assert second.returncode == 0


def test_the_state_file_is_synced_before_it_is_renamed_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_rename = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def rename(self: Path, target: Any) -> Path:
        done.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    state_module._replace(tmp_path / "file", "text")
    assert done == ["file", "rename", "directory"]


def test_the_state_is_written_beside_the_event_loop(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sync hangs, clients are served."""

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            gate = Gate(monkeypatch, state_module, "_replace")
            change = asyncio.create_task(changes.change_export("disk", **{**UNCHANGED, "description": "new"}))
            await gate.until_reached()
            assert await client.read(0, 512) == bytes(512)
            gate.open.set()
            await change
            await client.close()

    tell(story())


def test_a_change_goes_on_when_its_asker_goes_away_and_the_next_waits(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            gate = Gate(monkeypatch, state_module, "_replace")
            change = asyncio.create_task(changes.add_export("one", MIB, pool=None, **UNCHANGED))
            await gate.until_reached()
            change.cancel()
            with pytest.raises(asyncio.CancelledError):
                await change
            second = asyncio.create_task(changes.add_export("two", MIB, pool=None, **UNCHANGED))
            gate.open.set()
            await second
            assert [export.name for export in house.service.status().exports] == ["disk", "one", "two"]

    tell(story())


def test_a_stop_waits_for_the_change_under_way_and_refuses_the_next(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            gate = gate_disk(house, "resize")
            change = asyncio.create_task(changes.resize_export("disk", 16 * MIB, yes=False, force=False))
            assert await asyncio.to_thread(gate.reached.wait, GATE_SECONDS)
            passed: list[str] = []
            real = house.service._usages.stop

            async def noted() -> None:
                passed.append("the stop went on")
                await real()

            monkeypatch.setattr(house.service._usages, "stop", noted)
            stopping = asyncio.create_task(house.service.stop())
            late = asyncio.create_task(changes.add_export("late", MIB, pool=None, **UNCHANGED))
            while house.service._nbd._hosting is not None:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert passed == []
            gate.open.set()
            assert (await change).size_bytes == 16 * MIB
            await stopping
            with pytest.raises(UserError, match="the server stops"):
                await late
            monkeypatch.setattr(house.service, "stop", nothing)

    async def nothing() -> None:
        pass

    tell(story())
