"""What a start makes of a journal: all that was flushed, and nothing that was not written."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest

from nbdzram.bounds import Bounds
from nbdzram.config import Durability, PoolConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import UserError
from nbdzram.server import segments
from nbdzram.server.chains import sync_directory
from nbdzram.stream.journal import GROUP_HEAD_BYTES, GROUP_MAGIC, HEAD_BYTES, Group, GroupHead, Segment
from nbdzram.stream.layout import ExportPart, Origin
from nbdzram.stream.sending import Progress, Source, send
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    ADDED,
    AS_IT_IS,
    MIB,
    as_the_power_left_it,
    begun_from,
    checkpointing,
    disk,
    files,
    flushing,
    journal,
    of,
    play,
    whole,
)


def test_what_was_flushed_is_there_after_the_power_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1) + noise(2))
            await journal(service).synced()
            disk(service).trim(0, BLOCK)
            await service.changes.add_export("other", MIB, **{**ADDED, "allow_addresses": ["10.0.0.0/8"]})
            disk(service, "other").write(BLOCK, noise(3))
            await journal(service).synced()
            await service.changes.take_moment("monday")
            await service.changes.rename_export("other", "second")
            await service.changes.resize_export("disk", 8 * MIB, yes=False, force=False)
            await journal(service).synced()
            await service.changes.change_export("second", **{**AS_IT_IS, "bounds": {"iops": 500}})  # this alone
            await journal(service).synced()
            held = {export.name: whole(export.disk) for export in service._exports}
            disk(service).write(0, text(9))
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left, begun=False) as service:
            assert {export.name: whole(export.disk) for export in service._exports} == held
            assert service._exports.get("second").access.addresses == ("10.0.0.0/8",)
            assert service._exports.get("second").bounds == Bounds(iops=500)
            assert service._exports.get("disk@monday").read_only
            await journal(service).synced()
            assert len(service._pools["default"].pool.disks()) == len(held)

    play(story)
    assert "4 groups of the journal behind the checkpoint" in caplog.text


def test_what_a_file_held_before_does_not_look_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            for number in range(5):
                disk(service).write(number * BLOCK, text(number))
                await journal(service).synced()
            await of(service).take()
            await of(service).take()
            disk(service).write(0, text(7))
            await of(service).take()  # the first file is used again
            journal(service)._sequence = 0  # as of a server that was started again
            disk(service).write(0, text(8))
            await journal(service).synced()
            (used,) = (tmp_path / "kept").glob("*.journal")
            assert used.read_bytes().count(GROUP_MAGIC) == 5, "the old groups lie behind the new one"
            assert [group.head.sequence for group in Segment(used).groups()] == [1]
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert (await begun_from(left))[:BLOCK] == text(8)

    play(story)
    assert "damaged" not in caplog.text


def test_a_new_head_before_old_records_is_no_group(tmp_path: Path) -> None:
    """So the power leaves a file that is used again, where the first sector of a group reached the disk alone."""
    written: list[bytes] = []

    async def story() -> None:
        for name in ("old", "new"):
            async with flushing(tmp_path / name) as service:
                disk(service).write(0, text(7))
                await journal(service).synced()
                (segment,) = (tmp_path / name).glob("*.journal")
                assert len(list(Segment(segment).groups())) == 1
                written.append(segment.read_bytes())

    play(story)
    old, new = written
    torn = tmp_path / "torn.journal"
    torn.write_bytes(new[: HEAD_BYTES + GROUP_HEAD_BYTES] + old[HEAD_BYTES + GROUP_HEAD_BYTES :])
    assert list(Segment(torn).groups()) == []


async def left_with_groups(tmp_path: Path, count: int) -> Path:
    """What is on the disk after so many flushes, each of a block of noise of its own."""
    async with flushing(tmp_path / "kept") as service:
        for number in range(count):
            disk(service).write(number * BLOCK, noise(number))
            await journal(service).synced()
        return as_the_power_left_it(tmp_path / "kept", tmp_path / "left")


def test_a_group_that_stands_there_a_second_time_is_not_read_again(tmp_path: Path) -> None:
    """What lies behind the last one may be of any age, and looks like a group; numbers only rise."""

    async def story() -> None:
        path = await left_with_groups(tmp_path, 2) / "00000001.journal"
        read, content = Segment(path), path.read_bytes()
        first, second = read.groups()
        for group, end in ((first, second.start), (second, read.end)):
            path.write_bytes(content[: read.end] + content[group.start : end])
            assert [one.head for one in Segment(path).groups()] == [first.head, second.head]

    play(story)


@pytest.mark.parametrize(("bent", "told"), [(1, True), (2, False)])
def test_a_damaged_group_before_whole_ones_is_told_and_a_torn_last_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bent: int, told: bool
) -> None:
    async def story() -> None:
        left = await left_with_groups(tmp_path, 3)
        path = left / "00000001.journal"
        starts = [group.start for group in Segment(path).groups()]
        content = bytearray(path.read_bytes())
        content[starts[bent] + 2000] ^= 1
        path.write_bytes(content)
        held = await begun_from(left)
        assert held[: 3 * BLOCK] == b"".join(noise(number) for number in range(bent)).ljust(3 * BLOCK, b"\0")
        assert ("00000001.damaged" in files(left)) == told

    play(story)
    assert ("what was flushed from there on is lost" in caplog.text) == told


def test_a_damaged_journal_keeps_no_server_from_starting_where_a_file_has_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some file systems have no links, and a full one may have no room for another name."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    async def story() -> None:
        left = await left_with_groups(tmp_path, 2)
        content = bytearray((left / "00000001.journal").read_bytes())
        content[HEAD_BYTES + 2000] ^= 1
        (left / "00000001.journal").write_bytes(content)
        monkeypatch.setattr(Path, "hardlink_to", refuse)
        assert (await begun_from(left))[: 2 * BLOCK] == bytes(2 * BLOCK)

    play(story)
    assert "as no 00000001.damaged can be made: Operation not permitted" in caplog.text


def test_a_journal_that_does_not_follow_its_checkpoint_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await of(service).take()
            disk(service).write(0, text(2))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        newest = left / "00000002-since-00000001.stream"
        newest.write_bytes(newest.read_bytes()[:-1])
        assert (await begun_from(left))[:BLOCK] == bytes(BLOCK)

    play(story)
    assert "it begins at a moment that neither the checkpoint nor the journal before it has" in caplog.text


def failing_to_begin(directory: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has a new segment's name, and says that it has not; `to` gets the file as it is there."""
    sync = sync_directory

    def refuse(synced: Path) -> None:
        begun = max(synced.glob("*.journal"))
        if to.exists() or not begun.samefile(directory / "00000002.journal"):
            return sync(synced)
        shutil.copy(begun, to)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(segments, "sync_directory", refuse)


def test_a_segment_that_was_given_up_and_is_there_again_takes_nothing_from_the_one_that_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name reached the disk although the directory's sync failed, and its removal did not."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            failing_to_begin(tmp_path / "kept", tmp_path / "begun", monkeypatch)
            disk(service).write(0, text(1))
            await of(service).take()
            assert files(tmp_path / "kept") == ["00000001-full.stream", "00000001.journal"]
            disk(service).write(BLOCK, text(2))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        shutil.copy(tmp_path / "begun", left / "00000002.journal")
        assert (await begun_from(left))[: 2 * BLOCK] == text(1) + text(2)
        assert [path.name for path in left.glob("*.damaged")] == []

    play(story)
    assert "is damaged" not in caplog.text


def test_groups_that_begin_at_a_moment_that_was_passed_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two files say what followed: somebody's flushed writes are lost, and nobody may take that for right."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            disk(service).write(0, text(2))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        first, _ = Segment(left / "00000001.journal").groups()
        begun = segments.begin_segment(left, 2, first.head.identity)
        head = GroupHead(sequence=1, since=first.head.identity, identity=os.urandom(16), all_exports=False)
        begun.append(head, lambda write, salt: send((), 0, "another", write, Progress(), salt=salt))
        begun.close()
        assert (await begun_from(left))[:BLOCK] == text(2)
        assert [path.name for path in left.glob("*.damaged")] == ["00000002.damaged"]

    play(story)
    assert "it begins at a moment that neither the checkpoint nor the journal before it has" in caplog.text


def test_groups_that_do_not_fit_are_no_reason_to_begin_without_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(700)))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with pytest.raises(UserError, match=r"what was stored does not fit the pool 'default'"):
            async with flushing(left, pools=(PoolConfig(mem_limit=MIB // 2, durability=Durability.FLUSH),)):
                raise AssertionError

    play(story)


def test_a_group_that_is_whole_and_cannot_be_applied_is_no_reason_to_begin_without_it(tmp_path: Path) -> None:
    """Here of what nobody has its base."""
    part = ExportPart(
        number=0,
        name="other",
        size_bytes=MIB,
        read_only=False,
        domain=0,
        identity=7,
        origin=Origin.BASE,
        origin_number=99,
        origin_name="gone",
        description="",
        admits_nobody=False,
        addresses=(),
        certificates=(),
    )

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        (last,) = Segment(left / "00000001.journal").groups()
        begun = segments.begin_segment(left, 2, last.head.identity)
        head = GroupHead(sequence=1, since=last.head.identity, identity=os.urandom(16), all_exports=False)
        with Pool() as pool:
            copy = pool.create("other", MIB)
            told = [("default", pool, [Source(part=part, copy=copy, base=copy)])]
            begun.append(head, lambda write, salt: send(told, 0, "another", write, Progress(), salt=salt))
        begun.close()
        with pytest.raises(UserError, match=r"group 1 of the journal .* cannot be applied, and without it flushed"):
            await begun_from(left)

    play(story)


def test_a_disk_that_loses_a_group_between_two_looks_puts_no_older_checkpoint_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was whole a moment before, and the checkpoint is: without it what was flushed would be gone with the next."""

    def lost(_: Group) -> BinaryIO:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(0))
            await of(service).take()
            disk(service).write(0, text(1))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read group 2 of the journal"):
            patch.setattr(Group, "open", lost)
            await begun_from(left)
        assert (await begun_from(left))[:BLOCK] == text(1)

    play(story)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_journal_whose_checkpoints_were_moved_away_alone_is_not_begun_without(
    tmp_path: Path, is_damaged: bool
) -> None:
    """The server began with empty disks, and the journal went once a checkpoint of these stood."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            empty = as_the_power_left_it(tmp_path / "kept", tmp_path / "empty")
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        away = tmp_path / "away"
        away.mkdir()
        for directory in (empty, left):
            for path in directory.glob("*.stream"):
                shutil.move(path, away / f"{directory.name} {path.name}")
        (path,) = left.glob("*.journal")
        if is_damaged:
            path.write_bytes(bytes(HEAD_BYTES) + path.read_bytes()[HEAD_BYTES:])
        with pytest.raises(UserError, match="put back the checkpoints, or move the journal away too"):
            await begun_from(left)
        shutil.move(path, away)
        for directory in (empty, left):
            assert await begun_from(directory) == bytes(4 * MIB)

    play(story)


def test_a_journal_whose_checkpoints_were_moved_away_keeps_nobody_from_disks_that_outlived_the_server(
    tmp_path: Path,
) -> None:
    kept, state = tmp_path / "kept", tmp_path / "state"

    async def story() -> None:
        async with flushing(tmp_path / "other") as service:
            disk(service).write(0, text(0))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "other", tmp_path / "left")
        async with checkpointing(kept, state_dir=state) as service:
            disk(service).write(0, text(1))
        for path in kept.glob("*.stream"):
            path.unlink()
        shutil.copy(next(left.glob("*.journal")), kept)
        async with checkpointing(kept, state_dir=state) as service:
            assert disk(service).read(0, BLOCK) == text(1)

    play(story)
