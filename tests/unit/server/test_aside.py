"""Checkpoints that a start passed over: they stay for their disk's owner, and nobody takes them for old ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import CheckpointConfig
from nbdzram.server import aside as aside_module
from nbdzram.server.chains import checkpoints_in, next_number
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.server.lasting import MIB, NEVER, as_the_power_left_it, checkpointing, disk, files, of, play

NEWEST = "00000003-since-00000002"
CHAIN = ["00000001-full", "00000002-since-00000001", NEWEST]


async def left_by_a_server(tmp_path: Path) -> Path:
    """Three checkpoints of a chain."""
    async with checkpointing(tmp_path / "kept") as service:
        disk(service).write(MIB, b"".join(noise(number) for number in range(100, 120)))
        for number in range(3):
            disk(service).write(number * BLOCK, noise(number))
            await of(service).take()
        return as_the_power_left_it(tmp_path / "kept", tmp_path / "left")


def bend(file: Path) -> bytes:
    """What it held before."""
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    return content


def keeping(directory: Path, keep: int) -> dict[str, Any]:
    return {"checkpoint": CheckpointConfig(directory=directory, interval_seconds=NEVER, keep=keep)}


def test_what_a_start_passed_over_stays_when_old_ones_go_and_can_be_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With --checkpoint-keep 1 it was gone as soon as a whole one stood, and with it what its chain goes on from."""

    async def story() -> None:
        left = await left_by_a_server(tmp_path)
        whole = bend(left / f"{NEWEST}.stream")
        async with checkpointing(left, **keeping(left, 1)) as service:
            status = service.status().checkpoint
            assert status is not None
            assert status.damaged_files == 3
            disk(service).write(0, noise(9))
            await of(service).take()
            assert files(left) == [*(f"{name}.damaged" for name in CHAIN), "00000004-full.stream"]
        for name in CHAIN:
            (left / f"{name}.damaged").rename(left / f"{name}.stream")
        (left / f"{NEWEST}.stream").write_bytes(whole)
        for number in checkpoints_in(left):
            if number > 3:
                checkpoints_in(left)[number].path.unlink()
        async with checkpointing(left, **keeping(left, 1)) as service:
            assert disk(service).read(0, 3 * BLOCK) == noise(0) + noise(1) + noise(2)
            status = service.status().checkpoint
            assert status is not None
            assert status.damaged_files == 0

    play(story)
    assert f"3 checkpoints in {tmp_path / 'left'} that cannot be used, or belong to such, are kept as *.damaged" in (
        caplog.text
    )


def test_what_can_be_read_a_start_later_is_not_damaged(tmp_path: Path) -> None:
    async def story() -> None:
        left = await left_by_a_server(tmp_path)
        whole = bend(left / f"{NEWEST}.stream")
        async with checkpointing(left):
            cut = as_the_power_left_it(left, tmp_path / "cut")
        # A copy has files of its own; on the disk itself both names are of one.
        for name in CHAIN:
            (cut / f"{name}.damaged").unlink()
            (cut / f"{name}.damaged").hardlink_to(cut / f"{name}.stream")
        (cut / f"{NEWEST}.stream").write_bytes(whole)
        async with checkpointing(cut) as service:
            assert disk(service).read(2 * BLOCK, BLOCK) == noise(2)
            assert files(cut) == [f"{name}.stream" for name in CHAIN]

    play(story)


def test_as_many_damaged_chains_are_kept_as_of_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest: of a disk that damages one after another."""

    async def story() -> None:
        left = await left_by_a_server(tmp_path)
        for start in range(3):
            newest = max(checkpoints_in(left).items())[1].path
            bend(newest)
            async with checkpointing(left, **keeping(left, 2)) as service:
                disk(service).write(0, noise(20 + start))
                await of(service).take()
                disk(service).write(0, noise(30 + start))
                await of(service).take()
        damaged = checkpoints_in(left, ".damaged")
        assert len([one for one in damaged.values() if one.since is None]) == 2
        for one in checkpoints_in(left).values():
            one.path.unlink()
        assert next_number(left) == max(damaged) + 1

    play(story)
    assert f"{NEWEST}.damaged is gone" in caplog.text


@pytest.mark.parametrize(("refused", "where"), [("hardlink_to", Path), ("sync_directory", aside_module)])
def test_where_nothing_can_be_kept_aside_that_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
    where: type[Path] | object,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, os.strerror(1))

    async def story() -> None:
        left = await left_by_a_server(tmp_path)
        bend(left / f"{NEWEST}.stream")
        monkeypatch.setattr(where, refused, refuse)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 3 * BLOCK) == noise(0) + noise(1) + bytes(BLOCK)

    play(story)
    assert f"goes with old checkpoints, as no *.damaged can be made of it: {os.strerror(1)}" in caplog.text
