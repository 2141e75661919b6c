"""Changes at run time: who is attached is dealt with first, and what is made was remembered before."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.config import NOBODY, ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.engine.pool import Pool
from nbdzram.errors import NoSuchExport, PoolFull, UserError
from nbdzram.nbd.constants import Reply
from nbdzram.server import state as state_module
from nbdzram.server.exports import Peer, PeerDirectory
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME, State
from tests.support.loop_client import WireClient
from tests.wire import name_and_infos, option

MIB = 1 << 20
GATE_SECONDS = 30  # a gate that nobody opens is a test that fails
READ, WRITE, DISC, FLUSH = range(4)
UNCHANGED: dict[str, Any] = {
    "read_only": None,
    "description": None,
    "allow_addresses": None,
    "allow_certificates": None,
}


class House:
    """A service on a unix socket, with a state directory, that can be started again."""

    def __init__(self, directory: Path) -> None:
        self.state_dir = directory / "state"
        self.path = str(directory / "nbd.sock")
        self.exports: tuple[ExportConfig, ...] = (ExportConfig(name="disk", size_bytes=8 * MIB),)
        self.service: Service

    @contextlib.asynccontextmanager
    async def open(self, **given: Any) -> Any:
        config = ServerConfig(
            exports=self.exports,
            tcp=(),
            unix=(UnixAddress(path=Path(self.path)),),
            state_dir=self.state_dir,
        )
        self.service = Service(replace(config, **given))
        await self.service.start()
        try:
            yield self.service.changes
        finally:
            await self.service.stop()

    def pool(self) -> Pool:
        return self.service._pools["default"].pool

    async def client(self, name: bytes = b"disk") -> WireClient:
        return await (await WireClient.connect(self.path)).go(name)

    async def refusal(self, name: bytes = b"disk") -> tuple[int, str]:
        """What a client is told that asks for `name` now: reply and text."""
        client = await WireClient.connect(self.path)
        reply = (await client.option(7, name_and_infos(name)))[-1]
        await client.close()
        return reply.kind, reply.data.decode()

    def found(self, name: str = "disk") -> Any:
        return next(export for export in self.service.status().exports if export.name == name)

    def remembered(self) -> dict[str, Any]:
        exports: dict[str, Any] = json.loads((self.state_dir / FILE_NAME).read_text())["exports"]
        return exports


Story = Callable[[House], Awaitable[None]]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def tell(story: Awaitable[None]) -> None:
    uvloop.run(story)  # type: ignore[arg-type]


class Gate:
    """Stands before a blocking call until it is opened, so that a test can look at the moment before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = getattr(place, name)

        def wait(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.open.wait(GATE_SECONDS)
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, wait)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, GATE_SECONDS)


class GatedDisk:
    """A disk whose `method` waits behind a gate."""

    def __init__(self, disk: Any, method: str) -> None:
        self._disk, self._method = disk, method
        self.reached, self.open = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._disk, name)
        if name != self._method:
            return found

        def wait(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.open.wait(GATE_SECONDS)
            return found(*args, **kwargs)

        return wait


def gate_disk(house: House, method: str) -> GatedDisk:
    export = house.service._exports.get("disk")
    gated = GatedDisk(export.disk, method)
    export.disk = gated  # type: ignore[assignment]
    return gated


# ---- nobody attaches to what is being changed ----


@pytest.mark.parametrize(
    ("method", "ask", "doing"),
    [
        ("trim", lambda changes: changes.reset_export("disk", force=False), "reset"),
        ("resize", lambda changes: changes.resize_export("disk", MIB, yes=True, force=False), "resized"),
    ],
)
def test_nobody_attaches_while_an_export_is_changing(house: House, method: str, ask: Any, doing: str) -> None:
    async def story() -> None:
        async with house.open() as changes:
            gate = gate_disk(house, method)
            change = asyncio.create_task(ask(changes))
            assert await asyncio.to_thread(gate.reached.wait, GATE_SECONDS)
            kind, text = await house.refusal()
            assert (kind, f"is being {doing}; try again" in text) == (Reply.ERR_UNKNOWN, True)
            house.service._exports.get("disk").disk = gate._disk
            gate.open.set()
            await change
            client = await house.client()
            await client.close()

    tell(story())


def test_a_client_that_found_the_export_before_the_change_does_not_attach_during_it(house: House) -> None:
    """The handshake asks again in the moment of attaching."""

    async def story() -> None:
        async with house.open():
            exports = house.service._exports
            export = exports.get("disk")
            peer = Peer("unix client", local=True)
            assert exports.attachable(export, peer) is export
            with export.change("reset"), pytest.raises(NoSuchExport, match="is being reset"):
                exports.attachable(export, peer)
            export.set_rules(access=NOBODY, read_only=False, description="")
            with pytest.raises(NoSuchExport, match="does not admit"):
                exports.attachable(export, peer)
            exports.remove("disk")
            with pytest.raises(NoSuchExport, match="was removed"):
                exports.attachable(export, peer)

    tell(story())


def test_a_connection_asks_again_in_the_moment_of_attaching(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its handshake was told before: turns of others may lie between."""

    async def story() -> None:
        async with house.open():
            export = house.service._exports.get("disk")
            monkeypatch.setattr(PeerDirectory, "find", lambda *_: export)
            with export.change("reset"):
                client = await WireClient.connect(house.path)
                client.send(option(7, name_and_infos(b"disk")))
                async with asyncio.timeout(GATE_SECONDS):  # one that attached would not be closed
                    await client.reader.read()
                await client.close()
            assert house.service.status().handshake_failures["unknown_export"] == 1
            assert not export.connections

    tell(story())


@pytest.mark.parametrize(
    ("ask", "verb"),
    [
        (lambda changes, force: changes.reset_export("disk", force=force), "reset"),
        (lambda changes, force: changes.resize_export("disk", MIB, yes=True, force=force), "shrink"),
        (lambda changes, force: changes.remove_export("disk", force=force), "remove"),
    ],
)
def test_what_destroys_names_the_clients_and_the_remedy_and_with_force_ends_them_first(
    house: House, ask: Any, verb: str
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(4 * MIB, b"k" * 4096)
            with pytest.raises(UserError, match=rf"cannot {verb} .* 1 client is attached \(unix client.*--force"):
                await ask(changes, False)
            assert await client.read(4 * MIB, 4096) == b"k" * 4096
            other = await house.client()  # the refusal left the export open
            await ask(changes, True)
            for ended in (client, other):
                assert await ended.at_end()
                await ended.close()

    tell(story())


def test_nobody_is_attached_any_more_when_the_first_block_goes(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            export = house.service._exports.get("disk")
            attached_at_trim: list[int] = []
            disk = export.disk

            class Watched(GatedDisk):
                def __getattr__(self, name: str) -> Any:
                    if name == "trim":
                        attached_at_trim.append(len(export.connections))
                    return getattr(disk, name)

            export.disk = Watched(disk, "")  # type: ignore[assignment]
            await changes.reset_export("disk", force=True)
            assert attached_at_trim == [0]
            await client.close()

    tell(story())


# ---- who is admitted ----


def test_a_copy_admits_whom_its_origin_admits(house: House) -> None:
    house.exports = (ExportConfig(name="disk", size_bytes=MIB, allow_certificates=("vm1.example",)),)

    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "snap", read_only=True)
            await changes.copy_export("snap", "clone", read_only=False)
            for name in ("disk", "snap", "clone"):
                assert house.found(name).allow_certificates == ("vm1.example",)
                assert (await house.refusal(name.encode()))[0] == Reply.ERR_UNKNOWN
            assert (house.found("snap").read_only, house.found("clone").read_only) == (True, False)

    tell(story())


def test_a_declared_export_that_is_removed_and_added_again_has_its_declared_rules(house: House) -> None:
    house.exports = (
        ExportConfig(name="disk", size_bytes=MIB, read_only=True, description="d", allow_addresses=("10.0.0.0/8",)),
    )

    async def story() -> None:
        async with house.open() as changes:
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", 2 * MIB, pool=None, **UNCHANGED)
            found = house.found()
            assert (found.allow_addresses, found.read_only, found.description) == (("10.0.0.0/8",), True, "d")
            await changes.remove_export("disk", force=False)
            await changes.add_export(
                "disk", MIB, pool=None, **{**UNCHANGED, "read_only": False, "allow_addresses": ("10.1.0.0/16",)}
            )
            assert (house.found().allow_addresses, house.found().read_only) == (("10.1.0.0/16",), False)
            await changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ("10.2.0.0/16",)})
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", MIB, pool=None, **UNCHANGED)
            assert house.found().allow_addresses == ("10.2.0.0/16",)

    tell(story())


def test_an_export_that_nobody_declares_is_removed_and_added_again_for_those_whom_it_admitted(house: House) -> None:
    rules = {**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)}

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **rules)
            await changes.add_export("old", MIB, pool=None, **rules)
            await changes.rename_export("old", "new")
            await changes.remove_export("mine", force=False)
        async with house.open() as changes:
            for name in ("mine", "old"):
                await changes.add_export(name, MIB, pool=None, **UNCHANGED)
                assert house.found(name).allow_addresses == ("10.0.0.0/8",)
            assert house.found("new").allow_addresses == ("10.0.0.0/8",)
            await changes.change_export("mine", **{**UNCHANGED, "allow_addresses": ()})
            await changes.remove_export("mine", force=False)
            await changes.add_export("mine", MIB, pool=None, **UNCHANGED)
            assert house.found("mine").admits == "everyone"
            await changes.add_export("never there", MIB, pool=None, **UNCHANGED)
            assert house.found("never there").admits == "everyone"

    tell(story())


def test_a_server_that_ends_between_a_removal_and_its_memory_opens_the_name_to_nobody_new(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **{**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)})
            with monkeypatch.context() as ending:
                ending.setattr(State, "remember_removal", lambda *_: None)
                await changes.remove_export("mine", force=False)
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **UNCHANGED)
            assert house.found("mine").allow_addresses == ("10.0.0.0/8",)

    tell(story())


def test_rules_of_exports_that_are_gone_are_kept_for_as_many_names_as_a_pool_has(tmp_path: Path) -> None:
    state = State(tmp_path)
    most = state_module.FORMER_MAX
    for number in range(5):
        state.remember_removal(f"disk {number}", None, NOBODY)
    assert list(State(tmp_path).changes.former) == [f"disk {number}" for number in range(5)]
    state.remember_removal("disk 1", None, NOBODY)
    assert list(state.changes.former)[-1] == "disk 1"
    state.changes = replace(state.changes, former={f"disk {number}": NOBODY for number in range(most)})
    state.remember_removal("one more", None, NOBODY)
    assert len(state.changes.former) == most
    assert "disk 0" not in state.changes.former


def test_rules_changed_at_run_time_end_who_no_longer_qualifies_and_outlive_a_restart(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "description": "still open"})
            await client.write(0, b"w" * 512)  # nothing that concerns it was changed
            await changes.change_export("disk", **{**UNCHANGED, "allow_certificates": ("vm1.example",)})
            assert await client.at_end()
            assert (await house.refusal())[0] == Reply.ERR_UNKNOWN
            await client.close()
        house.exports = ()
        async with house.open() as changes:
            found = house.found()
            assert (found.admits, found.allow_certificates, found.description) == (
                "listed",
                ("vm1.example",),
                "still open",
            )
            await changes.change_export("disk", **{**UNCHANGED, "allow_certificates": (), "allow_addresses": ()})
            client = await house.client()
            assert await client.read(0, 512) == b"w" * 512
            await client.close()

    tell(story())


def test_read_only_ends_who_was_told_that_it_may_write_and_no_reader(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            writer = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "read_only": True})
            assert await writer.at_end()
            reader = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "read_only": True, "description": "again"})
            await changes.change_export("disk", **{**UNCHANGED, "read_only": False})
            assert await reader.read(0, 512) == bytes(512)
            await reader.close()
            await writer.close()

    tell(story())


def test_rules_that_were_not_known_are_known_once_one_is_given(house: House) -> None:
    async def story() -> None:
        async with house.open():
            pass
        (house.state_dir / FILE_NAME).unlink()
        house.exports = ()
        async with house.open() as changes:
            assert house.found().admits == "nobody"
            assert (await house.refusal())[0] == Reply.ERR_UNKNOWN
            await changes.change_export("disk", **{**UNCHANGED, "description": "says nothing of rules"})
            assert house.found().admits == "nobody"
            await changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)})
            assert house.found().admits == "listed"
            await (await house.client()).close()  # local: of a unix socket its mode decided

    tell(story())


def test_a_pool_that_is_added_again_comes_with_its_disks_and_their_rules(house: House) -> None:
    """And is not taken for an empty one, which may be removed."""
    fast = (PoolConfig(), PoolConfig(name="fast"))
    kept = ExportConfig(name="kept", size_bytes=MIB, pool="fast", allow_addresses=("10.0.0.0/8",))

    async def story() -> None:
        async with house.open(pools=fast, exports=(*house.exports, kept)):
            house.service._exports.get("kept").disk.write(0, b"k" * 512)
        async with house.open() as changes:
            assert [export.name for export in house.service.status().exports] == ["disk"]
            await changes.add_pool("fast", 0, "fold")
            assert house.found("kept").allow_addresses == ("10.0.0.0/8",)
            assert house.service._exports.get("kept").disk.read(0, 512) == b"k" * 512
            with pytest.raises(UserError, match="holds the export 'kept'"):
                await changes.remove_pool("fast")
        (house.state_dir / "other.pool").write_bytes((house.state_dir / "fast.pool").read_bytes())
        async with house.open() as changes:
            with pytest.raises(UserError, match="holds an export 'kept', and there is one of that name"):
                await changes.add_pool("other", 0, "fold")
            assert {pool.name for pool in house.service.status().pools} == {"default", "fast"}

    tell(story())


def test_a_pool_that_is_added_again_brings_back_no_removed_export(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.add_pool("fast", 0, "fold")
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", MIB, pool="fast", **UNCHANGED)
            await changes.remove_export("disk", force=False)
            await changes.remove_pool("fast")
            await changes.add_pool("fast", 0, "fold")
            assert house.remembered()["disk"]["removed"]
        async with house.open():
            assert house.service.status().exports == ()

    tell(story())


# ---- a change is remembered before it is made ----


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


class Delegate:
    """Another object with some of its members replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


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
                patched.setattr("nbdzram.server.changes.open_pool", refuses)
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
            with pytest.raises(UserError, match="starting or stopping"):
                await late
            monkeypatch.setattr(house.service, "stop", nothing)

    async def nothing() -> None:
        pass

    tell(story())


def test_a_loss_is_told_in_bytes_with_the_clients(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, os.urandom(MIB))
            await client.write(4 * MIB, os.urandom(64 << 10))
            whole = await changes.lose_export("disk", 0)
            assert (whole.stored_bytes, whole.clients) == (
                MIB + (64 << 10),
                (f"unix client (pid {os.getpid()}, uid {os.geteuid()})",),
            )
            assert whole.alone_bytes is not None
            assert whole.alone_bytes >= MIB
            assert (await changes.lose_export("disk", 2 * MIB)).stored_bytes == 64 << 10
            assert (await changes.lose_export("disk", 8 * MIB)).stored_bytes == 0
            await client.close()

    tell(story())


# -- a moment of all exports -------------------------------------------------------------------------------------------


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
