"""However a server ends, it leaves no thread, no descriptor and no task behind: whoever embeds it may start another."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import uvloop

from nbdzram.config import (
    CheckpointConfig,
    Durability,
    ExportConfig,
    PoolConfig,
    ServerConfig,
    UnixAddress,
)
from nbdzram.errors import UserError
from nbdzram.server.service import Service
from nbdzram.status import RunOptions
from nbdzram.stream.pipe import Pipe
from tests.support.loop_client import WireClient
from tests.unit.server.lasting import MIB, NEVER, asked

FLUSH = 3


def everything(directory: Path, *, journal: bool) -> ServerConfig:
    """A server that has one of each thing that it may have; a journal, or a state directory."""
    (directory / "sockets").mkdir()
    durability = Durability.FLUSH if journal else Durability.CHECKPOINT
    return ServerConfig(
        exports=(
            ExportConfig(name="disk", size_bytes=4 * MIB),
            ExportConfig(name="other", size_bytes=4 * MIB, pool="fast", snapshots_seconds=3600.0),
        ),
        pools=(PoolConfig(durability=durability), PoolConfig(name="fast", durability=durability)),
        tcp=(),
        unix=(UnixAddress(path=directory / "sockets" / "nbd"),),
        state_dir=None if journal else directory / "state",
        checkpoint=CheckpointConfig(directory=directory / "kept", interval_seconds=NEVER),
    )


async def use(service: Service, config: ServerConfig) -> None:
    """So that each of them has begun whatever it begins when it is first needed."""
    client = await (await WireClient.connect(str(config.unix[0].path))).go(b"other")
    service._exports.get("other").disk.write(0, os.urandom(MIB))
    await client.call(FLUSH, 0, 0)
    await service.usage()
    service.usage_so_far()
    for kind in ("fold", "scrub"):
        await service.run(kind, RunOptions(), pool=None, cpu_percent=100, progress=lambda *_: None)
    await send(service)
    await asked(service, "exports.copy", source="disk", name="copy")
    await client.close()


async def send(service: Service) -> None:
    """To somebody who reads it to its end."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Pipe(ours)) as pipe:
        reading = asyncio.create_task(
            asyncio.to_thread(lambda: sum(map(len, iter(partial(theirs.recv, 1 << 16), b""))))
        )
        await service.send_stream(["disk"], None, resumable=True, resume=None, pipe=pipe)
        ours.shutdown(socket.SHUT_WR)
        assert await reading > 0


async def stops(service: Service, config: ServerConfig) -> None:
    await service.start()
    await use(service, config)
    await service.stop()


async def stops_unused(service: Service, _: ServerConfig) -> None:
    await service.start()
    await service.stop()


async def gives_away(service: Service, config: ServerConfig) -> None:
    await service.start()
    await use(service, config)
    service._nbd.prepare_to_hand_over()
    following = Service(config, handed=await service.hand_over())
    await following.start(listen=False)
    await following.listen()
    await following.stop()


async def cannot_listen(service: Service, config: ServerConfig) -> None:
    config.unix[0].path.parent.rmdir()
    with pytest.raises(UserError):
        await service.start()


def threads() -> list[str]:
    """But for those on which the loop lets others wait."""
    return sorted(
        thread.name for thread in threading.enumerate() if not thread.name.startswith(("asyncio_", "uvloop_"))
    )


def descriptors() -> list[str]:
    """What those of this process lead to."""
    gc.collect()
    return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "state directory"])
@pytest.mark.parametrize("story", [stops, stops_unused, gives_away, cannot_listen], ids=lambda story: story.__name__)
def test_nothing_is_left_of_a_server(
    tmp_path: Path, story: Callable[[Service, ServerConfig], Awaitable[None]], *, journal: bool
) -> None:
    config = everything(tmp_path, journal=journal)

    def tasks() -> int:
        return len(asyncio.all_tasks())

    async def whole() -> None:
        service = Service(config)
        before = threads(), tasks()
        await story(service, config)
        assert (threads(), tasks()) == before  # while it is still there, or what it forgot would end with it

    uvloop.run(asyncio.sleep(0))  # what a loop opens once a process
    before = descriptors()
    uvloop.run(whole())
    assert descriptors() == before
    again = replace(config, unix=(UnixAddress(path=tmp_path / "again"),))
    uvloop.run(stops_unused(Service(again), again))  # its directories are free
