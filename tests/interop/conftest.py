"""A server that every client reaches over TCP, a unix socket and TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support.pki import Pki
from tests.support.reach import TRANSPORTS, Reach, tls_arguments
from tests.support.server import Nbdzram


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
