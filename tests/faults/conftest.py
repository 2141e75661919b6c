"""Servers to attack, and a crowd to attack them with."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.crowd import Crowd, many_descriptors, store
from tests.support.nbd_client import Client
from tests.support.pki import Pki
from tests.support.reach import tls_arguments
from tests.support.server import Nbdzram

Serve = Callable[..., Nbdzram]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory: that is where arenas live, and pages of a disk would make the copies slow."""
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    directory = root / f"nbdzram-test-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def target(serve: Serve) -> Nbdzram:
    """A server with 32 MiB of content that does not compress."""
    server = serve({"disk": "1G"})
    with server.client() as client:
        store(client)
    return server


@pytest.fixture
def impatience(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for a handshake deadline of half a second."""
    config = tmp_path_factory.mktemp("config") / "nbdzram.toml"
    config.write_text("[limits]\nhandshake_seconds = 0.5\ndrain_seconds = 1.0\n")
    return ("-c", str(config))


@pytest.fixture
def impatient(serve: Serve, impatience: tuple[str, ...]) -> Nbdzram:
    """An empty disk, and soon no time left."""
    return serve({"disk": "1G"}, arguments=impatience)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def trust(pki: Pki) -> ssl.SSLContext:
    """For clients of a server that has TLS."""
    return pki.client_context()


@pytest.fixture
def secured(serve: Serve, pki: Pki, trust: ssl.SSLContext) -> Nbdzram:
    """As `target`, and nobody gets in without TLS."""
    server = serve({"disk": "1G"}, arguments=tls_arguments(pki, mode="require", client_ca=False))
    with Client(server.unix_path, "disk", tls=trust) as client:
        store(client)
    return server


@pytest.fixture
def impatient_secured(serve: Serve, impatience: tuple[str, ...], pki: Pki) -> Nbdzram:
    """As `impatient`, and nobody gets in without TLS."""
    return serve({"disk": "1G"}, arguments=(*impatience, *tls_arguments(pki, mode="require", client_ca=False)))


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with many_descriptors(), Crowd() as gathered:
        yield gathered
