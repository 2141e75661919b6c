"""What a stop overtakes begins no more; and what it meets on its way keeps nothing from its end."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.server import service as service_module
from nbdzram.server.handover import FORMAT, KNOWS
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.house import Gate
from tests.unit.server.lasting import checkpointing, disk, flushing, journal, of, play, whole
from tests.unit.server.test_goes_on import listening


@pytest.mark.parametrize("how", ["told", "stopped"])
@pytest.mark.parametrize("at", ["require_arenas", "reach"])
def test_who_is_to_end_meanwhile_agrees_to_no_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, how: str
) -> None:
    """Or who asks is told that it is given everything, and `health` that no stop is under way."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", unix=listening(tmp_path)) as service:
            await service.listen()
            gate = Gate(monkeypatch, service_module if at == "reach" else service._state, at)
            path = tmp_path / "successor"
            with socket.socket(socket.AF_UNIX) as successor:
                successor.bind(str(path))
                successor.listen()
                asks = asyncio.create_task(service.takeover(str(path), os.getpid(), FORMAT, KNOWS, "", unit=""))
                await gate.until_reached()
                service.told_to_stop.set()
                if how == "stopped":
                    await service.stop()
                gate.open.set()
                with pytest.raises(UserError, match="it is ending already"):
                    await asks
            assert not service.taken_over.is_set()

    play(story)


@pytest.mark.parametrize("what", ["synced", "close"])
def test_a_mistake_of_ours_in_the_journal_costs_no_last_checkpoint_and_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """What is in memory is nowhere else then, and the next server needs the directory."""

    async def mistaken(*_: object) -> None:
        raise RuntimeError("of ours")

    async def story() -> None:
        kept = tmp_path / "kept"
        async with flushing(kept) as service:
            await of(service).take()
            disk(service).write(0, text(0))
            monkeypatch.setattr(journal(service), what, mistaken)
        assert "please report it" in caplog.text
        async with checkpointing(kept) as service:
            assert whole(disk(service))[:BLOCK] == text(0)

    play(story)
