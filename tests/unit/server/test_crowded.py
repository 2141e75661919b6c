"""A pool without a place for further copies has checkpoints all the same: those of the last one make room."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.server.service import Service
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import (
    EXPORTS,
    Platter,
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
