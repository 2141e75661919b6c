"""What a server does by itself goes on after a mistake of ours, and its end is gone through to the last."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import CheckpointConfig, ExportConfig, ServerConfig
from nbdzram.errors import EngineError
from nbdzram.machine import Machine
from nbdzram.server import checkpoints, headroom, history, service
from nbdzram.server.headroom import Headroom
from nbdzram.server.service import Service
from tests.unit.engine.blocks import text
from tests.unit.server.house import GATE_SECONDS, House, tell, until

QUICK = 0.01  # seconds, in place of a second and more


class Failing:
    """Fails at its first call, and tells of the second."""

    def __init__(self) -> None:
        self.calls = 0
        self.called_again = threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise KeyError("a mistake of ours")
        self.called_again.set()
        return 0

    async def until_called_again(self) -> None:
        assert await asyncio.to_thread(self.called_again.wait, GATE_SECONDS)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Failing]:
    def put(place: Any, name: str) -> Failing:
        made = Failing()
        monkeypatch.setattr(place, name, made)
        return made

    return put


@pytest.mark.parametrize("part", ["_relief", "_schedule"])
def test_the_pulse_goes_on(
    house: House, part: str, failing: Callable[[Any, str], Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TICK_SECONDS", QUICK)

    async def story() -> None:
        async with house.open():
            await failing(getattr(house.service, part), "consider").until_called_again()

    tell(story())


def test_the_history_goes_on(
    house: House, failing: Callable[[Any, str], Failing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "SAMPLE_SECONDS", QUICK)

    async def story() -> None:
        async with house.open():
            await failing(house.service._history, "_memory_bytes").until_called_again()

    tell(story())


def test_looks_at_memory_go_on(failing: Callable[[Any, str], Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "LOOK_SECONDS", QUICK)
    watching = Headroom(Machine(), list, lambda: None, 0)
    watching.start()
    try:
        failed = failing(watching, "look")
        assert failed.called_again.wait(GATE_SECONDS)
    finally:
        watching.stop()


def test_a_checkpoint_that_fails_for_no_known_reason_is_counted_and_the_next_is_taken(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setattr(checkpoints, "LOOK_SECONDS", QUICK)

    async def story() -> None:
        async with house.open(checkpoint=CheckpointConfig(directory=kept, interval_seconds=QUICK)):
            house.service._exports.get("disk").disk.write(0, text(1))
            await until(lambda: (told := house.service.status().checkpoint) is not None and told.failures > 0)
            monkeypatch.undo()
            await until(lambda: list(kept.glob("*.stream")))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(checkpoints, "send", fail)
    tell(asyncio.wait_for(story(), GATE_SECONDS))
    assert "met what nobody foresaw" in caplog.text


@pytest.mark.parametrize("part", ["_streams", "changes", "_schedule", "_usages"])
def test_the_end_is_gone_through_whatever_one_part_of_it_meets(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is taken, and the pools are let go."""
    kept = tmp_path / "kept"

    async def fail() -> None:
        raise KeyError("a mistake of ours")

    async def story() -> None:
        server = Service(
            ServerConfig(
                exports=(ExportConfig(name="disk", size_bytes=1 << 20),),
                tcp=(),
                checkpoint=CheckpointConfig(directory=kept, interval_seconds=1e6),
            )
        )
        await server.start(listen=False)
        disk = server._exports.get("disk").disk
        disk.write(0, text(1))
        monkeypatch.setattr(getattr(server, part), "stop", fail)
        with contextlib.suppress(KeyError):  # whoever stops the server hears of it, when it is done
            await server.stop()
        with pytest.raises(EngineError, match="closed"):
            disk.write(0, text(2))

    tell(story())
    assert list(kept.glob("*.stream"))


@pytest.mark.parametrize(
    ("part", "ends"),
    [("_streams", "stop"), ("changes", "stop"), ("_usages", "stop"), ("_checkpoints", "finish"), ("_schedule", "stop")],
)
def test_a_takeover_is_gone_through_whatever_one_part_of_it_meets_and_says_so(
    part: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no way back: the disks are the next one's."""

    async def fail(*_: Any) -> None:
        raise KeyError("a mistake of ours")

    async def story() -> None:
        config = ServerConfig(
            exports=(ExportConfig(name="disk", size_bytes=1 << 20),),
            tcp=(),
            checkpoint=CheckpointConfig(directory=tmp_path / "kept", interval_seconds=1e6),
        )
        server = Service(config)
        await server.start(listen=False)
        await server.listen()
        server._exports.get("disk").disk.write(0, text(1))
        server._nbd.prepare_to_hand_over()
        with monkeypatch.context() as patch:
            patch.setattr(getattr(server, part), ends, fail)
            handed = await server.hand_over()
        following = Service(config, handed=handed)
        await following.start(listen=False)
        await following.listen()
        assert following._exports.get("disk").disk.read(0, 4096) == text(1)
        await following.stop()

    tell(story())
    assert "met what nobody foresaw" in caplog.text
