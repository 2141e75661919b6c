"""Disks that outlive their server are kept where they were: others' checkpoints, found at the path, are left alone."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import CheckpointConfig, PoolConfig, UnixAddress
from nbdzram.engine.pool import Pool
from nbdzram.errors import UserError
from nbdzram.machine import Machine
from nbdzram.server.claim import Claim
from nbdzram.server.restore import Restore
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME, remembered_in
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import (
    EXPORTS,
    as_the_power_left_it,
    asked,
    checkpointing,
    disk,
    flushing,
    flushing_config,
    groups,
    journal,
    of,
    play,
    whole,
)

REFUSED = r"has the checkpoints of other disks than those of this server, or newer .*, and they would go in time; name"


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def kept_in(directory: Path) -> str:
    return str(json.loads((directory / FILE_NAME).read_text())["kept_in"])


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


async def wrote(opened: Any, directory: Path, state: Path | None, number: int) -> None:
    """A server's life: its first block is text(number)."""
    async with opened(directory, state_dir=state) as service:
        disk(service).write(0, text(number))
        await of(service).take()


@pytest.mark.parametrize("opened", [checkpointing, flushing])
def test_directories_of_two_servers_that_were_exchanged_are_told(tmp_path: Path, opened: Any) -> None:
    """Each went on with its own disks, and the other's checkpoints went, the only ones of disks that ended."""
    ours, theirs, state = tmp_path / "ours", tmp_path / "theirs", Path("/dev/shm") / f"kept-{tmp_path.parent.name}"

    async def story() -> None:
        await wrote(opened, ours, state, 1)
        await wrote(opened, theirs, None, 2)
        exchange(ours, theirs)
        before = bytes_of(ours)
        for _ in range(2):
            with pytest.raises(UserError, match=REFUSED):
                await wrote(opened, ours, state, 3)
        assert bytes_of(ours) == before
        exchange(ours, theirs)
        async with opened(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(1)
        async with opened(theirs) as service:
            assert whole(disk(service))[:BLOCK] == text(2)

    try:
        play(story)
    finally:
        for path in state.glob("*"):
            path.unlink()
        state.rmdir()


def test_disks_that_were_never_kept_anywhere_are_not_kept_beside_others(tmp_path: Path) -> None:
    async def story() -> None:
        await wrote(checkpointing, tmp_path / "theirs", None, 1)
        async with checkpointing(tmp_path, state_dir=tmp_path / "state", checkpoint=CheckpointConfig()) as service:
            disk(service).write(0, text(2))
        with pytest.raises(UserError, match=REFUSED):
            await wrote(checkpointing, tmp_path / "theirs", tmp_path / "state", 3)
        for path in (tmp_path / "theirs").glob("*.stream"):
            path.rename(tmp_path / path.name)
        await wrote(checkpointing, tmp_path / "theirs", tmp_path / "state", 3)  # as it was told to
        assert kept_in(tmp_path / "theirs") == kept_in(tmp_path / "state")

    play(story)


def without_identity(directory: Path) -> None:
    """As an older version has it."""
    found = json.loads((directory / FILE_NAME).read_text())
    del found["kept_in"]
    (directory / FILE_NAME).write_text(json.dumps(found))


def copied(directory: Path) -> None:
    """To another disk, at the same path."""
    left = as_the_power_left_it(directory, directory.with_name("copy"))
    exchange(directory, left)


def emptied(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("change", [without_identity, copied, emptied, lambda _: None])
def test_what_is_its_own_or_nobodys_a_server_goes_on_in(tmp_path: Path, change: Callable[[Path], None]) -> None:
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        identity = kept_in(state)
        assert len(identity) == 16
        assert kept_in(ours) == identity
        change(ours)
        await wrote(checkpointing, ours, state, 2)
        known = remembered_in(state)
        assert kept_in(ours) == known.kept_in != identity == known.kept_before[0]
        for pool in state.glob("*.pool"):  # the machine ended, and what is on its disk is all that there is
            pool.unlink()
        async with checkpointing(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(2)
        assert kept_in(ours) == kept_in(state) != identity  # of the disks that came

    play(story)


def removed(remembered: Path) -> None:
    """As a start that finds it damaged says; or it was nowhere, as in a unit without a RuntimeDirectory."""
    remembered.unlink()


def of_an_older_version(remembered: Path) -> None:
    """Which wrote this, and no checkpoint since: a newer one did before it, and does again."""
    without_identity(remembered.parent)


@pytest.mark.parametrize("forget", [removed, of_an_older_version])
def test_disks_of_which_it_is_not_remembered_where_they_are_kept_go_on_there(
    tmp_path: Path, forget: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """They were taken for others, and no server started."""
    ours, theirs, state = tmp_path / "ours", tmp_path / "theirs", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, theirs, None, 1)
        await wrote(checkpointing, ours, state, 1)
        forget(state / FILE_NAME)
        async with checkpointing(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(1)
        assert kept_in(state) == kept_in(ours)
        with pytest.raises(UserError, match=REFUSED):  # and from now on it is remembered
            await wrote(checkpointing, theirs, state, 3)

    play(story)
    assert f"the checkpoints in {ours} are taken for theirs" in caplog.text


def test_disks_that_lay_aside_meanwhile_do_not_take_newer_checkpoints_for_old_ones(tmp_path: Path) -> None:
    """Their state directory was not mounted, or not named: they were served on, and these went in time."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        await wrote(checkpointing, ours, None, 2)
        before = bytes_of(ours)
        with pytest.raises(UserError, match=f"{REFUSED}.*; to begin from these, move the .pool files out of {state}$"):
            await wrote(checkpointing, ours, state, 3)
        assert bytes_of(ours) == before
        (state / "default.pool").rename(tmp_path / "default.pool")  # as it was told to
        async with checkpointing(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(2)

    play(story)


def test_servers_that_begin_from_copies_of_one_directory_do_not_take_the_others(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"

    async def story() -> None:
        await wrote(checkpointing, one, None, 1)
        as_the_power_left_it(one, other)
        await wrote(checkpointing, one, tmp_path / "state-of-one", 2)
        await wrote(checkpointing, other, tmp_path / "state-of-other", 3)
        exchange(one, other)
        for place in (one, other):
            with pytest.raises(UserError, match=REFUSED):
                await wrote(checkpointing, place, tmp_path / f"state-of-{place.name}", 4)

    play(story)


def test_the_directory_that_disks_came_from_is_theirs_before_it_has_their_identity(tmp_path: Path) -> None:
    """Where it was not there for a while; and where the power failed before a checkpoint stood."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, None, 1)
        before = kept_in(ours)
        async with checkpointing(ours, state_dir=state) as service:
            ours.rename(tmp_path / "away")
            await of(service).take()
            exchange(ours, tmp_path / "away")
            assert kept_in(ours) == before
            cut, then = [as_the_power_left_it(one, tmp_path / f"{one.name}-then") for one in (ours, state)]
            await of(service).take()
            assert kept_in(ours) == kept_in(state) != before
        async with checkpointing(cut, state_dir=then) as service:
            await of(service).take()
        assert kept_in(cut) == kept_in(then)

    play(story)


def test_disks_that_are_there_are_served_though_it_cannot_be_remembered_where_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room in the state directory keeps no server from starting; where disks are to come, it must be remembered."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        without_identity(state)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            async with checkpointing(ours, state_dir=state) as service:
                assert whole(disk(service))[:BLOCK] == text(1)
            with pytest.raises(UserError, match="cannot remember the change"):
                await wrote(checkpointing, ours, tmp_path / "new", 2)

    def full(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    play(story)
    assert f"until then nobody can tell whose checkpoints lie in {ours}" in caplog.text


def test_a_start_that_is_cut_off_knows_whose_checkpoints_it_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the first disk that came, where the next one finds disks."""
    ours, state = tmp_path / "ours", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, None, 1)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power"):
            patch.setattr(Restore, "from_newest", cut)
            await wrote(checkpointing, ours, state, 2)
        assert json.loads((state / FILE_NAME).read_text())["came_from"] == kept_in(ours)
        async with checkpointing(ours, state_dir=state) as service:
            assert whole(disk(service))[:BLOCK] == text(1)

    from_newest = Restore.from_newest

    def cut(restore: Restore, directory: Path) -> None:
        assert from_newest(restore, directory) is not None
        raise RuntimeError("the power")

    play(story)


def test_disks_that_began_empty_have_another_identity_than_those_that_come_late(tmp_path: Path) -> None:
    """Their pools are gone, their checkpoints' file system is not mounted yet, and what is remembered is there."""
    ours, late, state = tmp_path / "ours", tmp_path / "late", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        ours.rename(late)
        (state / "default.pool").unlink()
        async with checkpointing(ours, state_dir=state) as service:
            await of(service).take()
            exchange(ours, late)
            before = bytes_of(ours)
            disk(service).write(0, text(2))
            for _ in range(3):
                await of(service).take()
            assert bytes_of(ours) == before
        with pytest.raises(UserError, match=REFUSED):
            await wrote(checkpointing, ours, state, 3)

    play(story)


@pytest.mark.parametrize("comes_back", [False, True])
def test_who_takes_over_does_not_go_on_beside_others(tmp_path: Path, *, comes_back: bool) -> None:
    """What was mounted there since: a takeover fails, and the server goes on, and leaves that alone as before."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    async def story() -> None:
        await wrote(flushing, theirs, None, 1)
        config = flushing_config(ours, unix=(UnixAddress(path=tmp_path / "nbd.sock"),))
        service = Service(config)
        await service.start(listen=False)
        await service.listen()
        disk(service).write(0, text(2))
        await of(service).take()
        exchange(ours, theirs)
        before = bytes_of(ours)
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        if not comes_back:
            handed.tls, handed.kept.ours = None, None
            with pytest.raises(UserError, match=REFUSED):
                await Service(config, handed=handed).start(listen=False)
            handed.close()
            assert bytes_of(ours) == before
            return
        service = Service(config, handed=handed)
        await service.start(listen=False)
        await service.listen()
        try:
            assert whole(disk(service))[:BLOCK] == text(2)
            for _ in range(2):
                await of(service).take()
            with pytest.raises(UserError, match="it cannot be noted"):
                await asked(service, "pools.add", name="fast")
        finally:
            await service.stop()
        assert bytes_of(ours) == before

    play(story)


def test_who_gets_the_directory_late_leaves_what_another_wrote_there_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It went on alone, as a takeover had failed, while another server had the directory that is at the path now."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    async def story() -> None:
        config = flushing_config(ours, unix=(UnixAddress(path=tmp_path / "nbd.sock"),))
        service = Service(config)
        await service.start(listen=False)
        await service.listen()
        await of(service).take()
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        ours.rename(tmp_path / "away")
        await wrote(flushing, theirs, None, 1)
        theirs.rename(ours)
        before = bytes_of(ours)
        other = Claim(ours)
        other.take()
        service = Service(config, handed=handed)
        await service.start(listen=False)
        await service.listen()
        other.release()
        await service.stop()  # takes one, or tries to
        assert bytes_of(ours) == before

    play(story)
    assert "this server did not begin from what lies there" in caplog.text


def test_where_all_exports_were_removed_nothing_of_others_comes_and_nothing_of_them_goes(tmp_path: Path) -> None:
    ours, theirs, state = tmp_path / "ours", tmp_path / "theirs", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, theirs, None, 1)
        async with checkpointing(ours, state_dir=state) as service:
            await of(service).take()
            await asked(service, "exports.remove", name="disk")
        exchange(ours, theirs)
        with pytest.raises(UserError, match=REFUSED):
            await wrote(checkpointing, ours, state, 2)

    play(story)


def test_one_pool_of_several_that_was_lost_does_not_begin_empty_beside_checkpoints_that_have_it(tmp_path: Path) -> None:
    """Its file was damaged and moved away: its exports were empty, without a word, and the checkpoints went in time."""
    ours, state = tmp_path / "ours", tmp_path / "state"
    exports = (*EXPORTS[:1], replace(EXPORTS[1], pool="fast"))
    given: dict[str, Any] = {"state_dir": state, "exports": exports, "pools": (PoolConfig(), PoolConfig(name="fast"))}
    opened = partial(checkpointing, exports=exports, pools=given["pools"])

    async def story() -> None:
        async with checkpointing(ours, **given) as service:
            disk(service).write(0, text(1))
            disk(service, "other").write(0, text(2))
        (state / "fast.pool").rename(tmp_path / "fast.pool")
        for _ in range(2):
            with pytest.raises(UserError, match=r"fast\.pool is not there, as other pools are, .* the export 'other'"):
                await wrote(opened, ours, state, 3)
        left = as_the_power_left_it(ours, tmp_path / "left")
        for stream in ours.glob("*.stream"):  # as it was told to
            stream.unlink()
        async with checkpointing(ours, **given) as service:
            assert whole(disk(service))[:BLOCK] == text(1)
            assert not any(whole(disk(service, "other")))
        for pool in state.glob("*.pool"):
            pool.unlink()
        Pool(
            path=str(state / "default.pool")
        ).close()  # as a start leaves it that is killed behind the first that it makes
        async with checkpointing(left, **given) as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(2)

    play(story)


def test_the_disks_own_directory_that_comes_late_is_gone_on_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They outlived their server, and the file system of their checkpoints was mounted behind its start."""
    ours, late, state = tmp_path / "ours", tmp_path / "late", tmp_path / "state"

    async def story() -> None:
        await wrote(checkpointing, ours, state, 1)
        ours.rename(late)
        async with checkpointing(ours, state_dir=state) as service:
            disk(service).write(0, text(2))
            await of(service).take()
            exchange(ours, late)
            disk(service).write(0, text(3))
            await of(service).take()
            left = as_the_power_left_it(ours, tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service))[:BLOCK] == text(3)

    play(story)
    assert "this server did not begin from" not in caplog.text


def test_disks_that_lay_aside_do_not_take_a_journal_that_went_on_meanwhile_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint stands there yet of the server that has flushed since."""
    ours, state = tmp_path / "ours", tmp_path / "state"
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)

    async def story() -> None:
        async with flushing(ours, state_dir=state) as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            await asked(service, "pools.add", name="fast")
        async with flushing(ours, begun=False) as service:
            disk(service).write(0, text(2))
            await journal(service).synced()
            assert "fast" in remembered_in(ours).pools
            left = as_the_power_left_it(ours, tmp_path / "left")
        assert groups(left) == 1
        exchange(ours, left)
        with pytest.raises(UserError, match=REFUSED):
            await wrote(flushing, ours, state, 3)
        async with flushing(ours, begun=False) as service:
            assert whole(disk(service))[:BLOCK] == text(2)

    play(story)
