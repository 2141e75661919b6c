"""A disk that nobody sees yet, served to the one program that fills it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from urllib.parse import quote

from nbdzram.config import EVERYONE, Limits, ServerConfig, TlsConfig, UnixAddress
from nbdzram.engine.disk import Disk
from nbdzram.server.exports import Export, Exports
from nbdzram.server.listener import NbdServer
from nbdzram.server.sockets import place_for_sockets


@contextlib.asynccontextmanager
async def served_alone(disk: Disk, config: ServerConfig) -> AsyncIterator[str]:
    """In here the disk can be written at the URI that this gives: on a unix socket that only our user can reach."""
    exports = Exports()
    exports.add(Export(name=disk.name, disk=disk, pool_name="", access=EVERYONE, read_only=False))
    with place_for_sockets() as directory:
        path = directory / "load.sock"
        limits = dataclasses.replace(  # those are for clients, and this is ours: nbdcopy comes with four connections
            config.limits, connections=Limits().connections, handshake_seconds=Limits().handshake_seconds
        )
        here = (UnixAddress(path=path),)
        alone = dataclasses.replace(config, tcp=(), vsock=(), unix=here, tls=TlsConfig(), limits=limits)
        nbd = NbdServer(exports, alone)
        await nbd.start(environment={})
        try:
            yield f"nbd+unix:///{quote(disk.name, safe='')}?socket={quote(str(path))}"
        finally:
            await nbd.drain()
