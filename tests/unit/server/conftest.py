"""A server of this package on a unix socket, inside the test's own event loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from nbdzram.config import EVERYONE, Limits, ServerConfig, TlsConfig, TlsMode, UnixAddress
from nbdzram.engine.pool import Pool
from nbdzram.server.exports import Export, Exports
from nbdzram.server.listener import NbdServer
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.unit.server.house import House

SIZE = 96 << 20


class Stage:
    """A running server with an export `disk` and a read-only export `frozen`."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "nbd.sock")
        self.pool = Pool()
        self.exports = Exports("disk")
        disk = self.pool.create("disk", SIZE)
        self.disk = Export(
            name="disk", disk=disk, pool_name="default", access=EVERYONE, read_only=False, description="for tests"
        )
        self.exports.add(self.disk)
        frozen = self.pool.create("frozen", 1 << 20, read_only=True)
        self.frozen = Export(name="frozen", disk=frozen, pool_name="default", access=EVERYONE, read_only=True)
        self.exports.add(self.frozen)
        self.config = ServerConfig(tcp=(), unix=(UnixAddress(path=Path(self.path)),), default_export="disk")
        self.server: NbdServer

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        self.server = NbdServer(self.exports, self.config)
        await self.server.start({})
        try:
            yield
        finally:
            await self.server.drain()

    async def client(self, name: bytes = b"disk", *, style: int = 1, contexts: tuple[bytes, ...] = ()) -> WireClient:
        client = await WireClient.connect(self.path)
        return await client.go(name, style=style, contexts=contexts)


Story = Callable[[Stage], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.pool.close()


@pytest.fixture
def play(stage: Stage) -> Play:
    """Run a story on a running server: play(story), or play(story, Limits(...))."""

    def run(story: Story, limits: Limits | None = None) -> None:
        async def whole() -> None:
            async with stage.serving():
                await story(stage)

        if limits is not None:
            stage.config = replace(stage.config, limits=limits)
        uvloop.run(whole())

    return run


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """An authority that servers and clients trust."""
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def certificate(pki: Pki) -> tuple[Path, Path]:
    """Of a server that is called localhost, and its key."""
    return pki.issue("localhost", file="server")


Secure = Callable[..., None]


@pytest.fixture
def secure(stage: Stage, certificate: tuple[Path, Path]) -> Secure:
    """Give the stage's server TLS: secure(mode=..., client_ca=...)."""

    def give(*, mode: TlsMode = TlsMode.ON, client_ca: Path | None = None) -> None:
        tls = TlsConfig(mode=mode, certificate=certificate[0], key=certificate[1], client_ca=client_ca)
        stage.config = replace(stage.config, tls=tls)

    return give


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def note_syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on each fsync, and each renaming of a path, in their order."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        done.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(path: Path, to: Path) -> Path:
        done.append(f"rename {path.name} {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    return done
