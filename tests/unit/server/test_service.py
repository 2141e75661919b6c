"""A service and its parts: what it asks of them, and that a mistake in one of them ends none of the others unheard."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.config import ExportConfig, ServerConfig, UnixAddress
from nbdzram.errors import EngineError, UserError
from nbdzram.server.handover import Counted
from nbdzram.server.history import CLOCK_STEP_SECONDS
from nbdzram.server.service import Service
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.server.house import MIB, House, tell


def config(directory: Path) -> ServerConfig:
    """Of a server in memory."""
    return ServerConfig(
        exports=(ExportConfig(name="disk", size_bytes=MIB),),
        tcp=(),
        unix=(UnixAddress(path=directory / "nbd.sock"),),
    )


def test_what_exports_cost_is_counted_when_it_is_asked_for(tmp_path: Path) -> None:
    """Of what is known already there is another question."""
    house = House(tmp_path)

    async def story() -> None:
        async with house.open():
            house.pool().disks()[0].write(0, noise(1) + noise(2))
            assert (await house.service.usage())["disk"].stored == 2 * BLOCK
            assert house.service.usage_so_far()[0]["disk"].stored == 2 * BLOCK

    tell(story())


def test_how_old_things_are_goes_by_the_clock_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock was wrong as its server began, or that slept, had checkpoints as old as that for good."""
    house, ahead = House(tmp_path), 0.0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)

    async def story() -> None:
        nonlocal ahead
        async with house.open():
            before = house.service.status()
            for set_to in (-86400.0, 3600.0):
                ahead = set_to
                while abs(house.service.status().started_at - before.started_at - ahead) > CLOCK_STEP_SECONDS:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            again = house.service.status()
            assert again.uptime_seconds > before.uptime_seconds

    tell(story())


def test_what_is_told_of_an_export_is_what_holds_for_it(tmp_path: Path) -> None:
    """Not what its disk was made for, as that of a snapshot that clients may write by now."""
    house = House(tmp_path)
    rules: dict[str, Any] = {"allow_addresses": ["10.0.0.0/8"], "allow_certificates": ["vm1"], "description": "mine"}

    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "snapshot", read_only=True)
            for name in ("disk", "snapshot"):
                for read_only in (True, False):
                    await changes.change_export(name, read_only=read_only, **rules)
                    found = house.found(name)
                    assert found.read_only is read_only
                    assert (found.description, found.admits) == ("mine", "listed")
                    assert (found.allow_addresses, found.allow_certificates) == (("10.0.0.0/8",), ("vm1",))

    tell(story())


@pytest.mark.parametrize("part", ["_nbd.drain", "_streams.stop", "changes.stop"])
def test_a_mistake_while_it_stops_is_told_once_all_else_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    async def story() -> None:
        service = Service(config(tmp_path))
        await service.start()
        owner, name = service, part
        if "." in part:
            holder, name = part.split(".")
            owner = getattr(service, holder)
        real = getattr(owner, name)

        async def fails() -> None:
            await real()
            raise RuntimeError(part)

        monkeypatch.setattr(owner, name, fails)
        with pytest.raises(RuntimeError, match=part):
            await service.stop()
        with pytest.raises(EngineError, match="its pool was closed"):
            service._pools["default"].pool.create("another", MIB)

    uvloop.run(story())


class Keeper:
    """Notes what it is to keep, and until when nobody may have asked it to."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def keep(self, pool: str, _: int) -> None:
        self.kept.append(pool)

    def drop(self, pool: str) -> None:
        self.kept.remove(pool)


@pytest.mark.parametrize("end", ["stop", "hand_over"])
def test_what_was_counted_is_told_as_long_as_somebody_can_ask(tmp_path: Path, end: str) -> None:
    """A scraper that comes as the server ends would take 0 for a new beginning."""

    async def story() -> None:
        service = Service(config(tmp_path))
        await service.start()
        assert service._nbd._hosting is not None
        service._nbd._hosting.go_on_from(Counted(accepted=3, protocol_errors=5, handshake_failures={"timeout": 7}))
        service._nbd.prepare_to_hand_over()
        before = service.status()
        assert (before.connections_total, before.protocol_errors, before.handshake_failures["timeout"]) == (3, 5, 7)
        outcome = await getattr(service, end)()
        after = service.status()
        assert after.connections_total == before.connections_total
        assert after.protocol_errors == before.protocol_errors
        assert after.handshake_failures == before.handshake_failures
        if outcome is not None:
            outcome.close()

    asyncio.run(story())


@pytest.mark.parametrize("agrees", [True, False])
def test_who_takes_over_lets_nobody_keep_arenas_before_the_other_agrees(tmp_path: Path, *, agrees: bool) -> None:
    """The other may go on: what would be kept then is no part of what it serves."""

    async def story() -> None:
        first = Service(config(tmp_path))
        await first.start()
        first._nbd.prepare_to_hand_over()
        handed, keeper = await first.hand_over(), Keeper()
        handed.kept.keeper = keeper
        following = Service(config(tmp_path), handed=handed)
        await following.start(listen=False)
        seen: list[Any] = []

        def confirm() -> None:
            seen.extend([*keeper.kept, "asked"])
            if not agrees:
                raise UserError("the other goes on")

        if agrees:
            await following.listen(confirm)
        else:
            with pytest.raises(UserError, match="the other goes on"):
                await following.listen(confirm)
        assert seen == ["asked"]
        assert keeper.kept == (["default"] if agrees else [])
        await following.stop()

    uvloop.run(story())


def test_who_hangs_up_while_a_reload_is_under_way_has_another_behind_it() -> None:
    """The first one had read the file already: what was written since was not read before the next signal."""
    config = ServerConfig(tcp=(), unix=())
    begun, may_end = threading.Event(), threading.Event()
    read = 0

    def reread() -> ServerConfig:
        nonlocal read
        read += 1
        begun.set()
        assert may_end.wait(60)
        return dataclasses.replace(config, exports=(ExportConfig(name=f"v{read}", size_bytes=MIB),))

    async def story() -> list[str]:
        service = Service(config, reread)
        await service.start(listen=False)
        try:
            service.hang_up()
            await asyncio.to_thread(begun.wait, 60)
            service.hang_up()
            service.hang_up()  # both are answered by the one behind
            may_end.set()
            assert service._reload._soon is not None
            await service._reload._soon
            return sorted(export.name for export in service._exports)
        finally:
            await service.stop()

    assert uvloop.run(story()) == ["v1", "v2"]
    assert read == 2


def test_who_is_here_and_who_ever_came_are_two_counts(tmp_path: Path) -> None:
    async def story() -> None:
        house = House(tmp_path)
        async with house.open():
            told = []
            for _ in range(2):
                client = await house.client()
                status = house.service.status()
                told.append((status.connections, status.connections_total))
                await client.close()
                while house.service.status().connections:  # noqa: ASYNC110 - nothing tells of it
                    await asyncio.sleep(0)
            status = house.service.status()
            assert [*told, (status.connections, status.connections_total)] == [(1, 1), (1, 2), (0, 2)]

    uvloop.run(story())
