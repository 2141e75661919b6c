"""What it costs a server of many exports to be looked at: processor time, and how long its event loop is held.

Processor time, not wall time: both figures are the server's own, whatever else the machine does meanwhile. The loop is
watched from inside by a callback that asks for its next turn at once; between two turns the loop served nobody else.
"""

from __future__ import annotations

import asyncio
import gc
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import uvloop

from nbdzram.config import ExportConfig, ServerConfig, TcpAddress, UnixAddress
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import method_table
from nbdzram.control.server import ControlServer
from nbdzram.metrics.http import MetricsServer
from nbdzram.server.service import Service
from tests.bench.measure import MIB, median
from tests.support.nbd_client import Client
from tests.support.server import Nbdzram

EXPORTS = 100
SCRAPES = 50


def names() -> list[str]:
    return [f"disk{number}" for number in range(EXPORTS)]


def use(unix_path: Path) -> None:
    """Some requests of four kinds on each export, so that each has something to tell."""
    for name in names():
        with Client(unix_path, name) as client:
            client.write(0, bytes(range(256)) * 16)
            client.read(0, 4096)
            client.trim(0, 4096)
            client.flush()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        content: bytes = reply.read()
    return content


def ask(path: Path) -> object:
    """As `nbdzram top` does; a connection that waited for the other looks would be cut by then."""
    with ControlClient(path) as client:
        return client.call("status")


def processor_ms(directory: Path, path: str) -> float:
    """Of one GET of `path`, answered by a server of its own process."""
    with Nbdzram(directory, dict.fromkeys(names(), MIB), metrics=True) as server:
        use(server.unix_path)
        url = server.metrics_url.replace("/metrics", path)
        fetch(url)  # the first one imports and fills caches
        before = server.cpu_seconds()
        for _ in range(SCRAPES):
            fetch(url)
        return (server.cpu_seconds() - before) / SCRAPES * 1000


def longest_holds_ms(directory: Path) -> dict[str, float]:
    """For each way to look at a server: the longest hold of the loop in one look, the median of many looks."""
    return uvloop.run(_watch_looks(directory))


async def _watch_looks(directory: Path) -> dict[str, float]:
    unix = UnixAddress(path=directory / "nbd.sock")
    exports = tuple(ExportConfig(name=name, size_bytes=MIB) for name in names())
    service = Service(ServerConfig(exports=exports, tcp=(), unix=(unix,)))
    metrics = MetricsServer(TcpAddress(port=0), service)
    control = ControlServer(directory / "control.sock", method_table(service, service.changes))
    await service.start()
    await metrics.start()
    await control.start()
    try:
        await asyncio.to_thread(use, unix.path)
        gc.freeze()  # as `serve` does
        looks: dict[str, Callable[[], object]] = {
            "/metrics": lambda: fetch(metrics.url),
            "/status.json": lambda: fetch(metrics.url.replace("/metrics", "/status.json")),
            "nbdzram top": lambda: ask(control.path),
        }
        return {what: median([await _longest_hold_ms(look) for _ in range(SCRAPES)]) for what, look in looks.items()}
    finally:
        gc.unfreeze()
        await control.stop()
        await metrics.stop()
        await service.stop()


async def _longest_hold_ms(look: Callable[[], object]) -> float:
    loop = asyncio.get_running_loop()
    looking = asyncio.ensure_future(asyncio.to_thread(look))
    turns = [time.thread_time()]

    def turn() -> None:
        turns.append(time.thread_time())
        if not looking.done():
            loop.call_soon(turn)

    loop.call_soon(turn)
    await looking
    return max(later - earlier for earlier, later in pairwise(turns)) * 1000
