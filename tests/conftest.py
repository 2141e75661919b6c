"""Shared fixtures: real servers in a directory of their own, and an image of real files made once a session."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import images
from tests.support.server import Nbdzram

# An example that takes long tells of a busy machine, not of the code: none of our tests asserts a time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in the background of a script; every command that a test interrupts would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MIB = 1 << 20
IMAGE_BYTES = 64 * MIB


@pytest.fixture(autouse=True)
def _broken_pipes_end_no_test() -> Iterator[None]:
    """A command that runs in this process lets SIGPIPE end it, and a later test would be what it ends."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Nbdzram]]:
    """Start servers that must end well: serve({"disk": "64M"}, arguments=[...], metrics=True)."""
    with ExitStack() as stack:
        count = 0

        def start(exports: dict[str, str | int], *, arguments: tuple[str, ...] = (), metrics: bool = False) -> Nbdzram:
            nonlocal count
            count += 1
            directory = tmp_path / f"server{count}"
            directory.mkdir()
            return stack.enter_context(Nbdzram(directory, exports, arguments=arguments, metrics=metrics))

        yield start


@pytest.fixture
def server(serve: Callable[..., Nbdzram]) -> Nbdzram:
    """One server with the export `disk`, as large as `ext4_image`."""
    return serve({"disk": IMAGE_BYTES})


@pytest.fixture(scope="session")
def ext4_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 file system with part of Python's library in it twice: real files, real duplicates, real holes."""
    directory = tmp_path_factory.mktemp("image")
    tree = images.python_tree(directory / "tree", copies=2, packages=("asyncio", "email", "encodings", "json"))
    return images.ext4_image(directory / "ext4.img", tree, IMAGE_BYTES)
