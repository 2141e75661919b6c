"""A service on a unix socket that can be started again, and gates before what takes long: for tests of changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.config import ExportConfig, ServerConfig, UnixAddress
from nbdzram.engine.pool import Pool
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME
from tests.support.loop_client import WireClient
from tests.wire import name_and_infos

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
        before = self.numbers()
        client = await (await Guest.connect(self.path)).go(name)
        client.house, client.number = self, max(self.numbers() - before, default=None)
        return client

    def numbers(self) -> set[int]:
        """Of those who are attached."""
        return {one.number for one in self.service.clients()}

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


class Guest(WireClient):
    """A client, of whom the service knows that it has left when it has closed."""

    house: House
    number: int | None = None

    async def close(self) -> None:
        await super().close()
        async with asyncio.timeout(GATE_SECONDS):
            while self.number in self.house.numbers():  # noqa: ASYNC110 - the loop has steps to do
                await asyncio.sleep(0)


Story = Callable[[House], Awaitable[None]]


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


async def until(true: Callable[[], object], seconds: float = GATE_SECONDS) -> None:
    """What nobody tells of: it is looked at again and again. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


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


class Delegate:
    """Another object with some of its members replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
