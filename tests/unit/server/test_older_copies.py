"""Disks older than the checkpoints beside them, and directories that were copied, or lack a part: nothing goes."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import CheckpointConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.errors import UserError
from nbdzram.server import place as place_module
from nbdzram.server.checkpoints import Checkpoints
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME, remembered_in
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import (
    EXPORTS,
    Gate,
    as_the_power_left_it,
    checkpointing,
    disk,
    flushing,
    journal,
    of,
    play,
    whole,
)
from tests.unit.server.test_kept_in import REFUSED, bytes_of, exchange, kept_in, wrote


@pytest.mark.parametrize("opened", [checkpointing, flushing])
def test_an_older_copy_of_the_disks_does_not_take_newer_checkpoints_for_old_ones(tmp_path: Path, opened: Any) -> None:
    """A copy of the state directory was put back: what was flushed since went with the first checkpoint."""
    ours, saved = tmp_path / "ours", tmp_path / "saved"
    state = Path("/dev/shm") / f"older-{tmp_path.parent.name}"

    async def story() -> None:
        await wrote(opened, ours, state, 1)
        shutil.copytree(state, saved)
        await wrote(opened, ours, state, 2)
        shutil.rmtree(state)
        shutil.copytree(saved, state)
        before = bytes_of(ours)
        for _ in range(2):
            with pytest.raises(UserError, match=REFUSED):
                await wrote(opened, ours, state, 3)
        assert bytes_of(ours) == before
        (state / "default.pool").unlink()  # as it was told to
        async with opened(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(2)

    try:
        play(story)
    finally:
        shutil.rmtree(state)


def test_disks_know_the_directory_that_could_not_be_given_an_identity_by_many_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system was full: after 64 of them it was taken for that of other disks, and no server started."""
    monkeypatch.setattr(place_module, "BEFORE_MOST", 2)
    ours, state = tmp_path / "ours", tmp_path / "state"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(place_module, "note_in", full)
            for number in range(4):
                await wrote(checkpointing, ours, state, 2 + number)
        assert len(remembered_in(state).kept_before) == 3
        for number in range(2):
            await wrote(checkpointing, ours, state, 6 + number)
        assert len(remembered_in(state).kept_before) == 2
        assert kept_in(ours) == remembered_in(state).kept_in

    play(story)


def test_newer_checkpoints_that_come_late_are_not_taken_for_old_ones(tmp_path: Path) -> None:
    """Their file system was not mounted yet as the older copy of the disks was served."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        shutil.copytree(state, tmp_path / "saved")
        await wrote(checkpointing, ours, state, 2)
        shutil.rmtree(state)
        (tmp_path / "saved").rename(state)
        ours.rename(tmp_path / "late")
        before = bytes_of(tmp_path / "late")
        async with checkpointing(ours, state_dir=state) as service:
            await of(service).take()
            exchange(ours, tmp_path / "late")
            for number in range(3):
                disk(service).write(0, text(number + 3))
                await of(service).take()
        assert bytes_of(ours) == before

    play(story)


def test_a_takeover_is_no_start_and_whoever_goes_on_behind_one_that_fails_is_not_older(tmp_path: Path) -> None:
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        unix, kept = (UnixAddress(path=tmp_path / "nbd.sock"),), CheckpointConfig(directory=ours)
        config = ServerConfig(exports=EXPORTS, tcp=(), unix=unix, state_dir=state, checkpoint=kept)
        service = Service(config)
        await service.start(listen=False)
        await service.listen()
        known = service._state.changes
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        handed.tls, handed.kept.ours = None, None
        service = Service(config, handed=handed)
        await service.start(listen=False)
        await service.listen()
        await of(service).take()
        then = service._state.changes
        await service.stop()
        assert then.kept_in == known.kept_in == kept_in(ours)
        assert not then.kept_before
        await wrote(checkpointing, ours, state, 1)
        assert remembered_in(state).kept_before == (then.kept_in,)

    play(story)


def test_copies_of_the_disks_that_both_went_on_do_not_take_each_others_checkpoints(tmp_path: Path) -> None:
    """As of a machine that was copied with all that it has."""
    ours, theirs, state, copy = [tmp_path / name for name in ("ours", "theirs", "state", "copy")]

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        for one, other in ((ours, theirs), (state, copy)):
            shutil.copytree(one, other)
        await wrote(checkpointing, ours, state, 2)
        await wrote(checkpointing, theirs, copy, 3)
        for place, disks in ((ours, copy), (theirs, state)):
            with pytest.raises(UserError, match=REFUSED):
                await wrote(checkpointing, place, disks, 4)

    play(story)


def test_a_directory_has_the_identity_of_a_start_before_a_checkpoint_of_that_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed then, an older copy of the disks would take it for its own."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        before = kept_in(ours)
        async with checkpointing(ours, state_dir=state) as service:
            gate = Gate(monkeypatch)
            taking = asyncio.create_task(of(service).take())
            await asyncio.to_thread(gate.reached.wait, 60)
            there = kept_in(ours)
            gate.opened.set()
            await taking
        assert there == kept_in(state) != before

    play(story)


def test_what_lay_aside_for_some_starts_is_the_disks_own(tmp_path: Path) -> None:
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        shutil.copytree(ours, tmp_path / "aside")
        for number in range(3):
            await wrote(checkpointing, ours, state, number)
        exchange(ours, tmp_path / "aside")
        async with checkpointing(ours, state_dir=state) as service:
            await of(service).take()
            assert of(service).status.failures == 0  # type: ignore[union-attr]
            exchange(ours, tmp_path / "aside")
            await of(service).take()
            assert of(service).status.failures == 0  # type: ignore[union-attr]

    play(story)


def test_starts_that_keep_nothing_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that fails is started again and again, and its disks would know their directory no more."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        before = remembered_in(state)
        monkeypatch.setattr(Checkpoints, "take", nothing)
        async with checkpointing(ours, state_dir=state):
            pass
        assert remembered_in(state) == before

    async def nothing(_: Checkpoints) -> None:
        """Killed before that."""

    play(story)


def test_a_copy_that_was_begun_from_does_not_take_what_its_original_went_on_with(tmp_path: Path) -> None:
    """The directory was copied to try something; the two were exchanged later, and the one of the original took them
    for what it came from."""
    ours, tried = tmp_path / "ours", tmp_path / "tried"

    async def story() -> None:
        async with checkpointing(ours, state_dir=tmp_path / "state") as service:
            await of(service).take()
            as_the_power_left_it(ours, tried)
            disk(service).write(0, text(3))
        await wrote(checkpointing, tried, tmp_path / "state-of-tried", 2)
        exchange(ours, tried)
        before = bytes_of(tried)
        with pytest.raises(UserError, match=REFUSED):
            await wrote(checkpointing, tried, tmp_path / "state-of-tried", 4)
        assert bytes_of(tried) == before
        exchange(ours, tried)
        await wrote(checkpointing, tried, tmp_path / "state-of-tried", 4)
        await wrote(checkpointing, ours, tmp_path / "state", 5)

    play(story)


def test_a_copy_whose_disks_were_never_kept_does_not_take_what_its_original_went_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, killed before a checkpoint of its own stood, and started again, or not."""
    ours, tried, state = tmp_path / "ours", tmp_path / "tried", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        as_the_power_left_it(ours, tried)
        for name in ("once", "twice"):
            async with checkpointing(tried, state_dir=tmp_path / "state-of-tried"):
                as_the_power_left_it(tmp_path / "state-of-tried", tmp_path / name)
                monkeypatch.setattr(Checkpoints, "take", nothing)
            monkeypatch.undo()
        await wrote(checkpointing, ours, state, 2)
        exchange(ours, tried)
        before = bytes_of(tried)
        for name in ("once", "twice"):
            with pytest.raises(UserError, match=REFUSED):
                await wrote(checkpointing, tried, tmp_path / name, 3)
        assert bytes_of(tried) == before
        await wrote(checkpointing, ours, tmp_path / "twice", 3)  # what it came from

    async def nothing(_: Checkpoints) -> None:
        """Killed before that."""

    play(story)


POOLS = (PoolConfig(), PoolConfig(name="fast"))
IN_TWO = (EXPORTS[0], replace(EXPORTS[1], pool="fast"))
in_two_pools = partial(checkpointing, exports=IN_TWO, pools=POOLS)


@pytest.mark.parametrize("as_new", [b"", b"\0" * 65536])
def test_a_pool_of_several_whose_file_holds_nothing_does_not_begin_empty_beside_checkpoints(
    tmp_path: Path, as_new: bytes
) -> None:
    """As a copy leaves it for which there was no room."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        async with in_two_pools(ours, state_dir=state) as service:
            disk(service, "other").write(0, text(2))
        kept = tmp_path / "fast.pool"
        (state / "fast.pool").rename(kept)
        (state / "fast.pool").write_bytes(as_new)
        for _ in range(2):
            with pytest.raises(UserError, match=r"fast\.pool .* the export 'other'"):
                await wrote(in_two_pools, ours, state, 3)
        kept.replace(state / "fast.pool")
        async with in_two_pools(ours, state_dir=state) as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(2)

    play(story)


def test_a_pool_of_several_that_was_lost_with_what_was_remembered_does_not_begin_empty(tmp_path: Path) -> None:
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        async with in_two_pools(ours, state_dir=state) as service:
            disk(service, "other").write(0, text(2))
        for name in ("fast.pool", FILE_NAME):
            (state / name).unlink()
        with pytest.raises(UserError, match=r"fast\.pool .* the export 'other'"):
            await wrote(in_two_pools, ours, state, 3)

    play(story)


def test_what_others_put_into_the_directory_of_a_server_that_runs_does_not_go(tmp_path: Path) -> None:
    """In place, as rsync does: the directory was the same, and only files of its own were missed."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    async def story() -> None:
        await wrote(checkpointing, theirs, None, 1)
        async with checkpointing(ours) as service:
            await of(service).take()
            disk(service).write(0, text(9))
            await of(service).take()
            for path in ours.iterdir():
                path.unlink()
            shutil.copytree(theirs, ours, dirs_exist_ok=True)
            before = bytes_of(ours)
            for number in range(3):
                disk(service).write(0, text(number + 2))
                await of(service).take()
        assert bytes_of(ours) == before

    play(story)


@pytest.mark.parametrize("name", ["notes.new", "spare"])
def test_files_that_are_not_a_servers_own_stay(tmp_path: Path, name: str) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / name).write_bytes(b"of somebody else")

    async def story() -> None:
        for number in range(2):
            async with flushing(ours) as service:
                disk(service).write(0, text(number))
                await journal(service).synced()
                await of(service).take()
                await of(service).take()

    play(story)
    assert (ours / name).read_bytes() == b"of somebody else"
