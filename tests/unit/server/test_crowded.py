"""A pool without a place for further copies has checkpoints all the same: those of the last one make room. And it is
said where there are too many exports for that."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig
from nbdzram.engine import moment
from nbdzram.engine.pool import Pool
from nbdzram.errors import UserError
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server.restore import Restore
from nbdzram.server.service import Service
from nbdzram.server.state import State
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    ADDED,
    AS_IT_IS,
    EXPORTS,
    MIB,
    Platter,
    as_the_power_left_it,
    behind_a_power_cut,
    checkpointing,
    disk,
    flushing,
    journal,
    of,
    of_size,
    play,
)

NAMES = ("disk", "other")


def leave_a_place(service: Service) -> None:
    """In the pool, for one more disk; the others have disks of nobody's."""
    pool = service._pools["default"].pool
    with pytest.raises(UserError, match="4096 exports, its limit"):
        for number in range(1 << 20):
            last = pool.create(f"nobody's {number}", BLOCK)
    pool.delete(last)


def write(service: Service, number: int) -> None:
    for name in NAMES:
        disk(service, name).write(0, text(number))


def test_the_copies_of_the_last_checkpoint_make_room_for_the_next(tmp_path: Path) -> None:
    """Or else none would ever stand again: what changed since the last grows."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", exports=EXPORTS) as service:
            write(service, 1)
            await of(service).take()
            leave_a_place(service)
            for number in (2, 3):
                write(service, number)
                await of(service).take()
                status = service.status().checkpoint
                assert status is not None
                assert status.failures == 0
                held = await behind_a_power_cut(tmp_path, checkpointing)
                assert held == {name: of_size(text(number)) for name in NAMES}

    play(story)


def test_a_journal_that_died_is_mended_in_a_crowded_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept", exports=EXPORTS) as service:
            write(service, 1)
            await journal(service).synced()
            await of(service).take()
            platter = Platter(monkeypatch)
            platter.error = errno.EIO
            write(service, 2)
            with pytest.raises(OSError, match="Input/output error"):
                await journal(service).synced()
            platter.error = 0
            leave_a_place(service)
            write(service, 3)
            await of(service).take()
            assert journal(service).status.usable
            assert await behind_a_power_cut(tmp_path) == {name: of_size(text(3)) for name in NAMES}

    play(story)


def test_too_many_exports_for_a_journal_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints_module, "MOST_EXPORTS", 1)

    async def story() -> None:
        for directory, exports in (("few", 1), ("many", 2)):
            declared = tuple(ExportConfig(name=f"disk{number}", size_bytes=MIB) for number in range(exports))
            async with flushing(tmp_path / directory, exports=declared):
                assert ("too many for its places" in caplog.text) is (exports == 2)

    play(story)


def test_too_many_exports_for_a_journal_are_told_when_they_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and not by a server that has no journal."""
    monkeypatch.setattr(checkpoints_module, "MOST_EXPORTS", 1)
    monkeypatch.setattr(checkpoints_module, "LOOK_SECONDS", 0.01)

    async def story() -> None:
        async with checkpointing(tmp_path / "none") as service:
            await service.changes.add_export("another", MIB, **ADDED)
        async with flushing(tmp_path / "journal") as service:
            assert "too many for its places" not in caplog.text
            await service.changes.add_export("another", MIB, **ADDED)
            while "the pool 'default' has 2 exports" not in caplog.text:  # noqa: ASYNC110 - a look of another task
                await asyncio.sleep(0.01)
            await service.changes.add_export("third", MIB, **ADDED)
            look, looks = of(service)._tell_crowds, list[int]()

            def look_and_count() -> None:
                look()
                looks.append(len(looks))

            monkeypatch.setattr(of(service), "_tell_crowds", look_and_count)
            while len(looks) < 3:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        assert caplog.text.count("too many for its places") == 1

    play(story)


@pytest.mark.parametrize("server", [checkpointing, flushing])
def test_too_many_exports_for_any_checkpoint_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: Any
) -> None:
    """Without a journal nobody said why none stands."""
    monkeypatch.setattr(checkpoints_module, "MOST_EXPORTS", 1)
    monkeypatch.setattr(checkpoints_module, "MOST_COPIED", 2)

    async def story() -> None:
        for directory, exports in (("few", 2), ("many", 3)):
            declared = tuple(ExportConfig(name=f"disk{number}", size_bytes=MIB) for number in range(exports))
            async with server(tmp_path / directory, exports=declared) as service:
                of(service)._tell_crowds()
                of(service)._tell_crowds()
                assert caplog.text.count("3 exports; of more than 2 no checkpoint") == (exports == 3)
        assert caplog.text.count("too many for its places") == (server is flushing), "of three more is said"

    play(story)


async def take_a_chain(service: Service) -> None:
    """A whole checkpoint, and three of what changed since."""
    disk(service).write(BLOCK, b"".join(map(noise, range(64))))  # else a chain is soon larger than a whole one
    for number in range(4):
        write(service, number)
        await of(service).take()


@pytest.mark.parametrize("durable", [False, True], ids=["a chain", "and its journal"])
def test_a_start_from_a_chain_finds_places_for_as_many_exports_as_it_was_made_of(tmp_path: Path, durable: bool) -> None:
    """Half a pool's places, and a little: what an earlier stream had has its places no more when the next has come."""
    opened: Any = flushing if durable else checkpointing

    async def story() -> Path:
        async with opened(tmp_path / "kept", exports=EXPORTS) as service:
            await take_a_chain(service)
            assert len(list((tmp_path / "kept").glob("*-since-*.stream"))) >= 3
            if durable:
                for number in range(4, 7):
                    write(service, number)
                    await service.changes.change_export("disk", **{**AS_IT_IS, "description": str(number)})
                    await journal(service).synced()
            return as_the_power_left_it(tmp_path / "kept", tmp_path / "left")

    held = begun_with_places_for_two(asyncio.run(story()), durable=durable)
    assert held == dict.fromkeys(NAMES, text(6 if durable else 3))


def test_what_came_of_a_damaged_checkpoint_has_its_places_no_more_as_the_one_before_comes(tmp_path: Path) -> None:
    """Or else a server with as many exports would not start: nothing of the older one fits beside that."""

    async def story() -> Path:
        async with checkpointing(tmp_path / "kept", exports=EXPORTS) as service:
            await take_a_chain(service)
            return as_the_power_left_it(tmp_path / "kept", tmp_path / "left")

    left = asyncio.run(story())
    *_, newest = sorted(left.glob("*-since-*.stream"))
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert begun_with_places_for_two(left, durable=False) == dict.fromkeys(NAMES, text(2))
    assert newest.with_suffix(".damaged").exists()


def begun_with_places_for_two(left: Path, *, durable: bool) -> dict[str, bytes]:
    """What exports hold first that come from there into a pool with places for two of each, and one more."""
    with Pool() as pool:
        for number in range(4096 - 2 * len(EXPORTS) - 1):
            moment.prepare(pool, f"\nnobody's {number}", BLOCK)
        Restore([], {"default": pool}, State(None), for_a_journal=durable).from_newest(left)
        return {disk.name: disk.read(0, BLOCK) for disk in pool.disks()}
