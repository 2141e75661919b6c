"""The control socket's client side: what it leaves behind where nobody answers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable


def nothing(_: Path) -> None:
    """The directory is empty."""


def a_file(path: Path) -> None:
    path.touch()


def nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(path))


def descriptors() -> list[str]:
    """What those of this process lead to."""
    return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@pytest.mark.parametrize("make", [nothing, a_file, nobody_listens], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["control.sock", "n" * 200], ids=["path", "long path"])
def test_who_finds_no_server_leaves_no_socket_open(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = tmp_path / name
    if len(name) < 100:
        make(path)
    before = descriptors()
    with pytest.raises(ServerUnreachable, match="no server answers on") as refused:
        ControlClient(path)
    assert descriptors() == before, refused  # whoever has the error has what it happened in
