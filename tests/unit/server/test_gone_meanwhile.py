"""An export that goes with its pool while it is written costs nobody a flush, nor a checkpoint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from nbdzram.machine import Machine
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import journal as journal_module
from nbdzram.server.service import Service
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    ADDED,
    MIB,
    behind_a_power_cut,
    checkpointing,
    disk,
    flushing,
    journal,
    keep,
    of,
    of_size,
    open_here,
    play,
)


@pytest.fixture(autouse=True)
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()


async def gone_with_its_pool_beside(
    service: Service,
    writing: Coroutine[Any, Any, None],
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[], object] = lambda: None,
) -> None:
    """The export `brief`, and the pool `second`, while `module` sends what `writing` leads to."""
    send, reached, removed = module.send, threading.Event(), threading.Event()

    def behind_a_removal(*given: Any, **more: Any) -> None:
        reached.set()
        assert removed.wait(60)
        send(*given, **more)

    monkeypatch.setattr(module, "send", behind_a_removal)
    written = asyncio.ensure_future(writing)
    assert await asyncio.to_thread(reached.wait, 60)
    first()
    await service.changes.remove_export("brief", force=False)
    await service.changes.remove_pool("second")
    removed.set()
    await written


@pytest.mark.parametrize("opened", [flushing, checkpointing])
def test_an_export_that_goes_with_its_pool_while_it_is_written_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, opened: Callable[..., Any]
) -> None:
    """Its blocks cannot be read any more, and nobody needs them."""
    module: Any = journal_module if opened is flushing else checkpoints_module

    async def story() -> None:
        async with open_here(opened, tmp_path) as service:
            await service.changes.add_pool("second", 0, "fold")
            await service.changes.add_export("brief", MIB, **{**ADDED, "pool": "second"})
            await keep(service)
            disk(service, "brief").write(0, noise(1))
            disk(service).write(0, text(1))
            await gone_with_its_pool_beside(service, keep(service), module, monkeypatch)
            assert await behind_a_power_cut(tmp_path, opened) == {"disk": of_size(text(1)), "other": bytes(4 * MIB)}

    play(story)
    assert "brief" not in caplog.text


def test_an_export_that_goes_with_its_pool_fails_no_checkpoint_beside_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal has of it needs nobody any more either; what it has of others follows that checkpoint."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            await service.changes.add_pool("second", 0, "fold")
            await service.changes.add_export("brief", MIB, **{**ADDED, "pool": "second"})
            disk(service, "brief").write(0, noise(1))
            disk(service).write(0, text(1))
            taking = of(service).take()
            await gone_with_its_pool_beside(
                service, taking, checkpoints_module, monkeypatch, lambda: disk(service).write(BLOCK, text(2))
            )
            status = of(service).status
            assert status is not None
            assert status.failures == 0
            await journal(service).synced()
            found = await behind_a_power_cut(tmp_path)
            assert found == {"disk": of_size(text(1) + text(2)), "other": bytes(4 * MIB)}

    play(story)
