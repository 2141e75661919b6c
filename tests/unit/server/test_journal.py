"""The journal: FLUSH is answered when the disk has what changed, and a start has all that was flushed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.bounds import Bounds
from nbdzram.config import CheckpointConfig, Durability, ExportConfig, PoolConfig, ServerConfig
from nbdzram.errors import PoolFull, UserError
from nbdzram.machine import Machine
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import moments as moments_module
from nbdzram.server import segments
from nbdzram.server.chains import sync_directory
from nbdzram.server.journal import Journal
from nbdzram.server.service import Service
from nbdzram.stream.journal import GROUP_HEAD_BYTES, GROUP_MAGIC, HEAD_BYTES, GroupHead, Segment
from nbdzram.stream.sending import Progress, send
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.conftest import note_syncs
from tests.unit.server.test_checkpoints import ADDED, AS_IT_IS, Gate, as_the_power_left_it, disk, files, of, play, whole

MIB = 1 << 20
NEVER = 10**6


@contextlib.asynccontextmanager
async def serving(directory: Path, *, begun: bool = True, **given: Any) -> AsyncIterator[Service]:
    """A server whose FLUSH waits for its journal; `begun`: its first checkpoint stands."""
    config = ServerConfig(
        exports=(ExportConfig(name="disk", size_bytes=4 * MIB),),
        pools=(PoolConfig(durability=Durability.FLUSH),),
        tcp=(),
        unix=(),
        checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER),
    )
    service = Service(replace(config, **given))
    await service.start(listen=False)
    try:
        if begun:
            await journal(service).synced()
            async with of(service)._turn:
                pass  # and what it leads to has ended
        yield service
    finally:
        await service.stop()


def journal(service: Service) -> Journal:
    found = of(service).journal
    assert found is not None
    return found


def groups(directory: Path) -> int:
    return sum(len(list(Segment(path).groups())) for path in directory.glob("*.journal"))


class Platter:
    """Stands for the disk below fdatasync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.error = 0
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        sync = os.fdatasync

        def fdatasync(descriptor: int) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            self.count += 1
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", fdatasync)


async def begun_from(left: Path) -> bytes:
    """What `disk` holds on a server that begins from there."""
    async with serving(left, begun=False) as service:
        return whole(disk(service))


def test_what_was_flushed_is_there_after_the_power_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
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
        async with serving(left, begun=False) as service:
            assert {export.name: whole(export.disk) for export in service._exports} == held
            assert service._exports.get("second").access.addresses == ("10.0.0.0/8",)
            assert service._exports.get("second").bounds == Bounds(iops=500)
            assert service._exports.get("disk@monday").read_only
            await journal(service).synced()
            assert len(service._pools["default"].pool.disks()) == len(held)

    play(story)
    assert "4 groups of the journal follow the checkpoint" in caplog.text


def test_one_group_answers_all_who_came_before_its_moment_and_none_who_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            platter = Platter(monkeypatch)
            platter.opened.clear()
            disk(service).write(0, text(1))
            first = asyncio.ensure_future(journal(service).synced())
            assert await asyncio.to_thread(platter.reached.wait, 60)
            disk(service).write(BLOCK, text(2))
            late = [asyncio.ensure_future(journal(service).synced()) for _ in range(100)]
            await asyncio.sleep(0)
            assert not any(one.done() for one in [first, *late])
            platter.opened.set()
            await first
            await asyncio.gather(*late)
            assert platter.count == 2
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert (await begun_from(left))[: 2 * BLOCK] == text(1) + text(2)

    play(story)


def test_a_flush_of_nothing_new_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with serving(tmp_path) as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            platter = Platter(monkeypatch)
            await journal(service).synced()
            assert platter.count == 0
            assert journal(service).status.groups == 1

    play(story)


def test_a_flush_waits_for_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        gate = Gate(monkeypatch)
        async with serving(tmp_path, begun=False) as service:
            disk(service).write(0, text(1))
            flush = asyncio.ensure_future(journal(service).synced())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            assert not flush.done()
            assert not journal(service).status.usable
            gate.opened.set()
            await flush
            assert journal(service).status.usable

    play(story)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(errno.EIO, "failed (Input/output error)"), (errno.ENOSPC, "make room there, 256M and that of a whole")],
)
def test_behind_a_failed_sync_flushes_fail_until_a_new_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int, sentence: str
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            stays = files(tmp_path / "kept")
            monkeypatch.setattr(checkpoints_module, "LOOK_SECONDS", NEVER)
            platter = Platter(monkeypatch)
            platter.error = error
            disk(service).write(BLOCK, text(2))
            async with of(service)._turn:  # no checkpoint is taken meanwhile
                with pytest.raises(OSError, match="the journal in"):
                    await journal(service).synced()
                platter.error = 0
                with pytest.raises(OSError, match="the journal in"):
                    await journal(service).synced()
                assert platter.count == 1, "a sync that succeeds after one that failed proves nothing"
                assert not journal(service).status.usable
                assert sentence in journal(service).status.trouble
                assert journal(service).status.failures == 1
                assert stays == files(tmp_path / "kept"), "what it holds may be needed"
            await of(service).take()
            assert journal(service).status.trouble == ""
            disk(service).write(2 * BLOCK, text(3))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert (await begun_from(left))[: 3 * BLOCK] == text(1) + text(2) + text(3)

    play(story)
    assert sentence in caplog.text
    assert "FLUSH is answered again" in caplog.text


def test_a_checkpoint_that_began_before_the_journal_died_does_not_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            gate = Gate(monkeypatch)
            taking = asyncio.create_task(of(service).take())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            disk(service).write(BLOCK, text(2))
            await journal(service).synced()  # in the segment that begins at the moment of the checkpoint under way
            platter = Platter(monkeypatch)
            platter.error = errno.EIO
            disk(service).write(2 * BLOCK, text(3))
            with pytest.raises(OSError, match="the journal in"):
                await journal(service).synced()
            platter.error = 0
            gate.opened.set()
            await taking
            assert not journal(service).status.usable
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            await of(service).take()
            await journal(service).synced()
        assert (await begun_from(left))[: 2 * BLOCK] == text(1) + text(2)

    play(story)


@pytest.mark.parametrize("how", ["the file", "the directory", "hidden"])
def test_a_journal_that_no_start_would_find_answers_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Syncing a file without a name succeeds; a new checkpoint mends it."""

    caplog.set_level(logging.INFO)

    async def story() -> None:
        kept = tmp_path / "kept"
        async with serving(kept) as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            if how == "the file":
                next(kept.glob("*.journal")).unlink()
            elif how == "the directory":
                shutil.rmtree(kept)
            else:
                kept.rename(tmp_path / "elsewhere")
                kept.mkdir()
            disk(service).write(BLOCK, text(2))
            with pytest.raises(OSError, match="is not there any more"):
                await journal(service).synced()
            await of(service).take()
            disk(service).write(2 * BLOCK, text(3))
            await journal(service).synced()
            left = as_the_power_left_it(kept, tmp_path / "left")
        assert (await begun_from(left))[: 3 * BLOCK] == text(1) + text(2) + text(3)

    play(story)
    assert "FLUSH is answered again" in caplog.text


def test_segments_stay_until_a_checkpoint_behind_them_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(checkpoints_module, "_write_all", full)
                await of(service).take()
            disk(service).write(BLOCK, text(2))
            await journal(service).synced()
            assert files(tmp_path / "kept") == ["00000001-full.stream", "00000001.journal", "00000002.journal"]
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            await of(service).take()
            assert files(tmp_path / "kept") == [
                "00000001-full.stream",
                "00000003-since-00000001.stream",
                "00000003.journal",
                "spare",
            ]
        assert (await begun_from(left))[: 2 * BLOCK] == text(1) + text(2)

    play(story)


@pytest.mark.parametrize("why", ["the copies gave way", "a file is gone"])
def test_a_checkpoint_of_an_unchanged_moment_has_a_segment_of_its_own(tmp_path: Path, why: str) -> None:
    """Nothing was written since the last one, and it is written all the same: what its number leads to goes on."""

    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            if why == "the copies gave way":
                await of(service)._give_way()
            else:
                next((tmp_path / "kept").glob("*.stream")).unlink()
            await of(service).take()
            disk(service).write(0, noise(2))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            assert journal(service).status.failures == 0
        async with serving(left, begun=False) as again:
            assert disk(again).read(0, BLOCK) == noise(2)

    play(story)


def test_what_a_file_held_before_does_not_look_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
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
            async with serving(tmp_path / name) as service:
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


@pytest.mark.parametrize(("bent", "told"), [(1, True), (2, False)])
def test_a_damaged_group_before_whole_ones_is_told_and_a_torn_last_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bent: int, told: bool
) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            for number in range(3):
                disk(service).write(number * BLOCK, noise(number))
                await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
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


def test_a_journal_that_does_not_follow_its_checkpoint_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
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
        async with serving(tmp_path / "kept") as service:
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
        async with serving(tmp_path / "kept") as service:
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
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(700)))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with pytest.raises(UserError, match=r"cannot be applied, and without it flushed .* 3 times its mem_limit"):
            async with serving(left, pools=(PoolConfig(mem_limit=MIB // 2, durability=Durability.FLUSH),)):
                raise AssertionError

    play(story)


def test_a_clone_costs_a_group_next_to_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path / "kept") as service:
            disk(service).write(0, b"".join(noise(number) for number in range(500)))
            await journal(service).synced()
            for number in range(20):  # more than what was told last is looked at
                await service.changes.add_export(f"other{number}", MIB, **ADDED)
                disk(service, f"other{number}").write(0, noise(number))
            await journal(service).synced()
            before = journal(service).status.group_bytes
            await service.changes.copy_export("disk", "twin", read_only=False)
            disk(service, "twin").write(0, text(1))
            await journal(service).synced()
            assert journal(service).status.group_bytes - before < 4 * BLOCK
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with serving(left, begun=False) as service:
            assert disk(service, "twin").read(0, 2 * BLOCK) == text(1) + noise(1)

    play(story)


def test_what_is_told_of_an_export_is_of_the_same_moment_as_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with serving(tmp_path) as service:
            export, copy_changed = service._exports.get("disk"), moments_module._copy_changed
            calls: list[Any] = []

            def change_first(*given: Any) -> Any:
                if not calls:
                    export.description = "another"
                    export.disk.write(0, text(1))
                calls.append(given)
                return copy_changed(*given)

            monkeypatch.setattr(moments_module, "_copy_changed", change_first)
            export.disk.write(BLOCK, text(2))
            await journal(service).synced()
            last = journal(service)._last
            assert last is not None
            assert [seen.description for seen in last.roster] == ["another"]
            assert len(calls) == 2

    play(story)


def test_a_write_that_finds_no_room_lets_the_copies_of_the_last_group_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path, pools=(PoolConfig(mem_limit=2 * MIB, durability=Durability.FLUSH),)) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            await journal(service).synced()
            for number in range(0, 300, 100):
                while True:
                    try:
                        disk(service).write(number * BLOCK, b"".join(noise(1000 + number + at) for at in range(100)))
                    except PoolFull:
                        await asyncio.sleep(0.01)
                    else:
                        break
            await journal(service).synced()
            assert disk(service).read(299 * BLOCK, BLOCK) == noise(1299)

    play(story)


def test_a_flush_is_answered_although_the_first_checkpoint_gave_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "AGAIN_SECONDS", 0.01)

    async def story() -> None:
        gate = Gate(monkeypatch)
        pools = (PoolConfig(mem_limit=2 * MIB, durability=Durability.FLUSH),)
        async with serving(tmp_path, begun=False, pools=pools) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            assert await asyncio.to_thread(gate.reached.wait, 60)
            with pytest.raises(PoolFull):
                disk(service).write(0, b"".join(noise(1000 + number) for number in range(300)))
            flush = asyncio.ensure_future(journal(service).synced())
            gate.opened.set()
            async with asyncio.timeout(30):
                await flush

    play(story)


def test_a_journal_in_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)

    async def story() -> None:
        async with serving(tmp_path):
            pass

    play(story)
    assert "lies in memory, so what is flushed there ends with the power" in caplog.text


def test_a_long_journal_asks_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdzram.server.journal.LONG_BYTES", 8 * BLOCK)

    async def story() -> None:
        async with serving(tmp_path) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(10)))
            await journal(service).synced()
            while groups(tmp_path):  # noqa: ASYNC110 - a condition of another task
                await asyncio.sleep(0.01)

    play(story)


def test_rot_fails_the_flush_and_not_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with serving(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            disk(service).write(0, noise(1))
            with (tmp_path / "state" / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
                arena = Arena(view)
                place = arena.object_of(1)
                arena.set_word(place + 8, arena.word(place + 8) ^ 1)
            with pytest.raises(OSError, match="is not what was written"):
                await journal(service).synced()
            assert journal(service).status.usable
            disk(service).write(0, noise(2))  # which mends it
            await journal(service).synced()

    play(story)
    assert "FLUSH fails" in caplog.text


def test_rot_that_is_there_before_the_journal_fails_the_flush_that_would_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint stands until the block is written again; then one does by itself."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    monkeypatch.setattr(checkpoints_module, "AGAIN_SECONDS", 0.01)
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with serving(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            disk(service).write(0, noise(1))
        with (tmp_path / "state" / "default.pool").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            place = arena.object_of(1)
            arena.set_word(place + 8, arena.word(place + 8) ^ 1)
        async with serving(tmp_path / "kept", begun=False, state_dir=tmp_path / "state") as service:
            with pytest.raises(OSError, match="cannot begin: the export 'disk' cannot be sent: block 0 is not"):
                async with asyncio.timeout(30):
                    await journal(service).synced()
            disk(service).write(0, noise(2))
            while not journal(service).status.usable:  # noqa: ASYNC110 - a condition of another task
                await asyncio.sleep(0.01)
            await journal(service).synced()
            async with of(service)._turn:
                pass  # and what the checkpoint leads to has ended
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with serving(left, begun=False) as service:
            assert disk(service).read(0, BLOCK) == noise(2)

    play(story)


def test_a_state_directory_on_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: False)

    async def story() -> None:
        with pytest.raises(UserError, match=r"the state directory .* lies on a disk"):
            async with serving(tmp_path / "kept", state_dir=tmp_path / "state"):
                raise AssertionError

    play(story)


def test_a_state_directory_that_is_the_checkpoints_too_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one of them remembers would replace what the other does."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "there").symlink_to(tmp_path)

    async def story() -> None:
        with pytest.raises(UserError, match=r"is the state directory too, .* name another for the checkpoints"):
            async with serving(tmp_path / "there", state_dir=tmp_path):
                raise AssertionError

    play(story)


def test_a_file_of_the_journal_has_its_name_once_its_head_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = note_syncs(monkeypatch)
    segments.begin_segment(tmp_path, 3, bytes(16)).close()
    assert done == ["sync 00000003.new", "rename 00000003.new 00000003.journal", f"sync {tmp_path.name}"]
