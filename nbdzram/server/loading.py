"""A disk that nobody sees yet, served to the one program that fills it."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

from nbdzram.config import EVERYONE, ServerConfig, TlsConfig, UnixAddress
from nbdzram.engine.disk import Disk
from nbdzram.server.exports import Export, Exports
from nbdzram.server.listener import NbdServer


@contextlib.asynccontextmanager
async def served_alone(disk: Disk, config: ServerConfig) -> AsyncIterator[str]:
    """In here the disk can be written at the URI that this gives: on a unix socket that only our user can reach."""
    exports = Exports()
    exports.add(Export(name=disk.name, disk=disk, pool_name="", access=EVERYONE, read_only=False))
    with tempfile.TemporaryDirectory(prefix="nbdzram-") as directory:
        path = Path(directory) / "load.sock"
        alone = dataclasses.replace(config, tcp=(), vsock=(), unix=(UnixAddress(path=path),), tls=TlsConfig())
        nbd = NbdServer(exports, alone)
        await nbd.start(environment={})
        try:
            yield f"nbd+unix:///{quote(disk.name, safe='')}?socket={quote(str(path))}"
        finally:
            await nbd.drain()
