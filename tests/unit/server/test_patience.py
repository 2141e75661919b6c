"""A disk that fails without a word, by an answer that never comes: nobody waits for it unseen."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import UserError
from nbdzram.server import steadily
from nbdzram.server.handover import FORMAT, KNOWS
from nbdzram.server.service import Service
from nbdzram.server.steadily import Patience, end_all
from nbdzram.server.syncs import ArenaSync
from tests.unit.engine.blocks import text
from tests.unit.server.house import until
from tests.unit.server.lasting import disk, flushing, journal, of, play
from tests.unit.server.test_goes_on import listening

PATIENCE_SECONDS = 10


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait counts as a long one."""
    monkeypatch.setattr(steadily, "SLOW_SECONDS", 0.0)


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch, slow: None) -> threading.Event:  # noqa: ARG001
    """Each fdatasync does, until this is set."""
    goes_on, sync = threading.Event(), os.fdatasync

    def fdatasync(descriptor: int) -> None:
        assert goes_on.wait(PATIENCE_SECONDS)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return goes_on


@asynccontextmanager
async def waiting(
    directory: Path, hangs: threading.Event, **given: Any
) -> AsyncIterator[tuple[Service, asyncio.Task[None]]]:
    """A FLUSH for whose disk everybody waits."""
    async with flushing(directory, **given) as service:
        await of(service).take()
        disk(service).write(0, text(0))
        asks = asyncio.create_task(journal(service).synced())
        try:
            await until(lambda: journal(service).status.trouble, PATIENCE_SECONDS)
            yield service, asks
        finally:
            hangs.set()
            await asks


def test_a_flush_that_waits_for_a_disk_is_told(
    tmp_path: Path, hangs: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with waiting(tmp_path, hangs) as (service, asks):
            status = journal(service).status
            assert status.usable
            assert status.trouble == f"FLUSH waits for the disk of the journal in {tmp_path}"
            assert f"{status.trouble}, for 0 s by now" in caplog.messages
            hangs.set()
            await asks
            assert not journal(service).status.trouble
            assert f"{status.trouble} no longer, after 0 s" in caplog.messages

    play(story)


def test_nothing_is_taken_over_while_a_disk_gives_no_answer(tmp_path: Path, hangs: threading.Event) -> None:
    """It would end what it has, and refuse every change, for as long as that takes."""

    async def story() -> None:
        async with waiting(tmp_path / "kept", hangs, unix=listening(tmp_path)) as (service, _):
            await service.listen()
            with pytest.raises(UserError, match="which gives no answer"):
                await service.takeover(str(tmp_path / "nobody"), os.getpid(), FORMAT, KNOWS, "", unit="")
            assert not service.taken_over.is_set()

    play(story)


def test_a_flush_that_waits_for_the_disk_of_an_arena_is_told(
    tmp_path: Path, hangs: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "arena"
    says = f"FLUSH waits for the disk of {path}, for 0 s by now"

    async def story() -> None:
        with Pool(path=str(path)):
            sync = ArenaSync(path)
            asks = asyncio.create_task(sync.synced())
            try:
                await until(lambda: says in caplog.messages, PATIENCE_SECONDS)
            finally:
                hangs.set()
                await asks
                sync.close()

    play(story)


@pytest.mark.usefixtures("slow")
def test_an_end_tells_for_what_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        ended = asyncio.Event()
        ends = asyncio.create_task(end_all([("the last checkpoint", lambda: _wait(ended))]))
        says = "what ends waits for the last checkpoint, for 0 s by now"
        await until(lambda: says in caplog.messages, PATIENCE_SECONDS)
        ended.set()
        await ends

    play(story)


@pytest.mark.usefixtures("slow")
def test_a_stop_tells_that_it_waits_for_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a state directory whose disk gives no answer, say."""
    says = "the stop waits for clients, streams and the change under way, for 0 s by now"

    async def story() -> None:
        async with flushing(tmp_path) as service:
            async with service.changes._lock:
                stops = asyncio.create_task(service.stop())
                await until(lambda: says in caplog.messages, PATIENCE_SECONDS)
            await stops

    play(story)


def test_who_is_quick_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        with Patience("nobody waits") as patience:
            await asyncio.sleep(0)
        assert not patience.is_over
        assert not [message for message in caplog.messages if "nobody waits" in message]

    play(story)


async def _wait(ended: asyncio.Event) -> None:
    await ended.wait()
