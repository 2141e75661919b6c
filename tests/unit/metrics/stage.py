"""A metrics server of its own event loop's thread, for tests that are its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

from nbdzram.config import TcpAddress
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import NoSuchExport
from nbdzram.metrics.http import MetricsServer
from nbdzram.status import ClientStatus, ExportSample, HistorySample, ServerStatus
from tests.unit.records import SERVER, USAGE


@dataclass
class Show:
    """What the metrics server watches, as a test says it."""

    say: Callable[[], ServerStatus] = lambda: SERVER
    usage: dict[str, DiskUsage] = field(default_factory=lambda: {"disk": USAGE})
    usage_age: float | None = 2.0
    attached: tuple[ClientStatus, ...] = ()
    samples: tuple[HistorySample, ...] = (HistorySample(1.7e9, 1.0, 2.0, 3.0, 4.0, 5.0, 393_217),)
    of_exports: dict[str, tuple[ExportSample, ...]] = field(default_factory=dict)

    def status(self) -> ServerStatus:
        return self.say()

    def usage_so_far(self) -> tuple[dict[str, DiskUsage], float | None]:
        return self.usage, self.usage_age

    def clients(self) -> tuple[ClientStatus, ...]:
        return self.attached

    def history(self) -> tuple[HistorySample, ...]:
        return self.samples

    def history_of(self, name: str) -> tuple[ExportSample, ...]:
        if name not in self.of_exports:
            raise NoSuchExport(name)
        return self.of_exports[name]


def with_server(act: Callable[[str, int], Any], show: Show | None = None, hosts: tuple[str, ...] = ()) -> Any:
    """Run the blocking client code `act` with host and port of a live server."""

    async def both() -> Any:
        server = MetricsServer(TcpAddress(port=0), show or Show(), hosts)
        await server.start()
        port = int(server.url.split(":")[2].split("/")[0])
        try:
            return await asyncio.to_thread(act, "127.0.0.1", port)
        finally:
            await server.stop()

    return uvloop.run(both())
