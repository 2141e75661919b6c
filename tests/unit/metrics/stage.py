"""A metrics server of its own event loop's thread, for tests that are its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import uvloop

from nbdzram.config import TcpAddress
from nbdzram.engine.stats import DiskUsage
from nbdzram.metrics.http import MetricsServer
from nbdzram.status import ServerStatus
from tests.unit.records import SERVER, USAGE


async def usage() -> dict[str, DiskUsage]:
    return {"disk": USAGE}


def with_server(
    act: Callable[[str, int], Any],
    status: ServerStatus | Callable[[], ServerStatus] = SERVER,
    usage: Callable[[], Awaitable[Mapping[str, DiskUsage]]] = usage,
    hosts: tuple[str, ...] = (),
) -> Any:
    """Run the blocking client code `act` with host and port of a live server."""
    say = status if callable(status) else lambda: status

    async def both() -> Any:
        server = MetricsServer(TcpAddress(port=0), say, usage, hosts)
        await server.start()
        port = int(server.url.split(":")[2].split("/")[0])
        try:
            return await asyncio.to_thread(act, "127.0.0.1", port)
        finally:
            await server.stop()

    return uvloop.run(both())
