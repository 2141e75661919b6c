"""A server that every client reaches over TCP, a unix socket and TLS; and servers that take over from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support.pki import Pki
from tests.support.reach import TRANSPORTS, Reach, tls_arguments
from tests.support.server import Nbdzram
from tests.support.takeover import Line


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def client_files(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pki.client_directory(tmp_path_factory.mktemp("client"), "vm1.example")


@pytest.fixture(params=TRANSPORTS)
def reach(request: pytest.FixtureRequest, serve: Callable[..., Nbdzram], pki: Pki, client_files: Path) -> Reach:
    """The export `disk`, as large as `ext4_image`, over each transport in turn."""
    transport = str(request.param)
    arguments = tls_arguments(pki, mode="require") if transport == "tls" else ()
    return Reach(serve({"disk": IMAGE_BYTES}, arguments=arguments), transport, client_files)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.last.stop()


@pytest.fixture(params=["state-directory", "memory"])
def either_line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    """With disks in a state directory, and with disks in the process's own memory."""
    made = Line(tmp_path, in_memory=request.param == "memory")
    yield made
    made.last.stop()
