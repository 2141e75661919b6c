"""Servers that keep checkpoints and a journal, what they hold, and the disk below: for tests of what outlives them."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import uvloop

from nbdzram.config import CheckpointConfig, Durability, ExportConfig, PoolConfig, ServerConfig
from nbdzram.control.methods import Method, method_table
from nbdzram.engine.disk import Disk
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server.checkpoints import Checkpoints
from nbdzram.server.journal import Journal
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME
from nbdzram.stream.journal import Segment
from tests.support.arena import Arena

MIB = 1 << 20
EXPORTS = (ExportConfig(name="disk", size_bytes=4 * MIB), ExportConfig(name="other", size_bytes=4 * MIB))
NEVER = 10**6  # seconds: checkpoints are taken when a test says so
AS_IT_IS: dict[str, Any] = {
    "read_only": None,
    "description": None,
    "allow_addresses": None,
    "allow_certificates": None,
}
ADDED: dict[str, Any] = {**AS_IT_IS, "pool": None}
CHANGED: dict[str, Any] = {
    "read_only": True,
    "allow_addresses": ["10.0.0.0/8"],
    "iops": 7,
    "description": "of the operator",
}


@contextlib.asynccontextmanager
async def checkpointing(directory: Path, *, restore_from: Path | None = None, **given: Any) -> AsyncIterator[Service]:
    """A server in anonymous memory, as after a power failure, with this directory of checkpoints."""
    config = ServerConfig(
        exports=(ExportConfig(name="disk", size_bytes=4 * MIB),),
        tcp=(),
        unix=(),
        checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER),
    )
    service = Service(replace(config, **given), restore_from=restore_from)
    await service.start(listen=False)
    try:
        yield service
    finally:
        await service.stop()


def of(service: Service) -> Checkpoints:
    return service._checkpoints


def disk(service: Service, name: str = "disk") -> Disk:
    return service._exports.get(name).disk


def whole(found: Disk) -> bytes:
    return found.read(0, found.size_bytes)


def files(directory: Path) -> list[str]:
    """Of checkpoints and the journal."""
    return sorted(path.name for path in directory.iterdir() if path.name != FILE_NAME)


def as_the_power_left_it(directory: Path, to: Path) -> Path:
    """The files as they are now, while the server goes on; one that has no name of its own yet a start sweeps away."""
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("*.new"))
    return to


def play(story: Callable[[], Any]) -> None:
    uvloop.run(story())


class Gate:
    """Holds the first record of a checkpoint that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write = checkpoints_module._write_all

        def hold(file: BinaryIO, content: bytes) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            write(file, content)

        monkeypatch.setattr(checkpoints_module, "_write_all", hold)


def flushing_config(directory: Path, **given: Any) -> ServerConfig:
    """Of one whose FLUSH waits for its journal."""
    config = ServerConfig(
        exports=(ExportConfig(name="disk", size_bytes=4 * MIB),),
        pools=(PoolConfig(durability=Durability.FLUSH),),
        tcp=(),
        unix=(),
        checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER),
    )
    return replace(config, **given)


@contextlib.asynccontextmanager
async def flushing(directory: Path, *, begun: bool = True, **given: Any) -> AsyncIterator[Service]:
    """A server whose FLUSH waits for its journal; `begun`: its first checkpoint stands."""
    service = Service(flushing_config(directory, **given))
    await service.start(listen=False)
    try:
        if begun:
            await journal(service).synced()
            async with of(service)._turn:
                pass  # and what it leads to has ended
        yield service
    finally:
        await service.stop()


def journal(service: Service) -> Journal:
    found = of(service).journal
    assert found is not None
    return found


async def asked(service: Service, method: str, **given: Any) -> Any:
    """As control asks for it, and has its answer."""
    found = method_table(service, service.changes)[method]
    assert isinstance(found, Method)
    return await found.call(found.read(given), lambda *_: None)


def groups(directory: Path) -> int:
    return sum(len(list(Segment(path).groups())) for path in directory.glob("*.journal"))


class Platter:
    """Stands for the disk below fdatasync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.error = 0
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        sync = os.fdatasync

        def fdatasync(descriptor: int) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            self.count += 1
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", fdatasync)


async def begun_from(left: Path) -> bytes:
    """What `disk` holds on a server that begins from there."""
    async with flushing(left, begun=False) as service:
        return whole(disk(service))


def spoil(arena_path: Path, place_of: Callable[[Arena], int], bits: int = 1) -> None:
    """Flip bits of a word below a server that goes on."""
    with arena_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        place = place_of(arena)
        arena.set_word(place, arena.word(place) ^ bits)


def open_here(opened: Callable[..., Any], tmp_path: Path) -> Any:
    return opened(tmp_path / "kept", exports=EXPORTS, state_dir=tmp_path / "state")


async def keep(service: Service) -> None:
    """What the exports hold, on the disk."""
    await (of(service).take() if of(service).journal is None else journal(service).synced())


async def behind_a_power_cut(tmp_path: Path, opened: Callable[..., Any] = flushing) -> dict[str, bytes]:
    """What exports hold on a server that begins from what is on the disk now."""
    left = as_the_power_left_it(tmp_path / "kept", tmp_path / f"left-{time.monotonic_ns()}")
    given: dict[str, Any] = {"begun": False} if opened is flushing else {}
    async with opened(left, exports=EXPORTS, **given) as service:
        return {export.name: whole(export.disk) for export in service._exports}


def of_size(content: bytes, size_bytes: int = 4 * MIB) -> bytes:
    return content.ljust(size_bytes, b"\0")
