"""The journal: FLUSH is answered when the disk has what changed, and not before."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdzram.config import Durability, PoolConfig
from nbdzram.errors import PoolFull, UserError
from nbdzram.machine import Machine
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import moments as moments_module
from nbdzram.server import segments
from nbdzram.server.journal import Journal
from nbdzram.server.place import is_same
from tests.support.loop_client import WireClient
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.conftest import note_syncs
from tests.unit.server.lasting import (
    ADDED,
    MIB,
    NEVER,
    Gate,
    Platter,
    as_the_power_left_it,
    begun_from,
    disk,
    files,
    flushing,
    groups,
    journal,
    of,
    play,
    spoil,
    whole,
)
from tests.wire import CMD_FLUSH


def test_one_group_answers_all_who_came_before_its_moment_and_none_who_came_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
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
        async with flushing(tmp_path) as service:
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
        async with flushing(tmp_path, begun=False) as service:
            disk(service).write(0, text(1))
            flush = asyncio.ensure_future(journal(service).synced())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            assert not flush.done()
            assert not journal(service).status.usable
            gate.opened.set()
            await flush
            assert journal(service).status.usable

    play(story)


def test_what_a_client_wrote_is_in_the_journal_when_its_flush_is_answered(tmp_path: Path) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            ours, theirs = socket.socketpair()
            served = asyncio.create_task(service._nbd.serve_socket(ours))
            client = await (await WireClient.over(await asyncio.open_unix_connection(sock=theirs))).go()
            for number in range(1, 4):
                before = groups(tmp_path / "kept")
                await client.write(number * BLOCK, text(number))
                assert groups(tmp_path / "kept") == before
                assert (await client.call(CMD_FLUSH, 0, 0)).error == 0
                assert groups(tmp_path / "kept") == before + 1
            await client.close()
            await served

    play(story)


def test_who_waits_for_a_journal_that_ends_before_it_began_is_told_so(tmp_path: Path) -> None:
    async def story() -> None:
        async def release(*_: object) -> None:
            pass

        closing = Journal(tmp_path, SimpleNamespace(release=release), ["default"])  # type: ignore[arg-type]
        waiting = [asyncio.ensure_future(closing.synced()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(one.done() for one in waiting)
        await closing.close()
        for one in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(one, OSError)
            assert "the server stops" in str(one)

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
        async with flushing(tmp_path / "kept") as service:
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
        async with flushing(tmp_path / "kept") as service:
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
        async with flushing(kept) as service:
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
        async with flushing(tmp_path / "kept") as service:
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


def test_checkpoints_that_fail_take_no_room_of_a_whole_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not fit would fill the disk below the journal too, 16 MiB a minute."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(checkpoints_module, "_write_all", full)
                for number in range(6):
                    disk(service).write(number * BLOCK, noise(number))
                    await journal(service).synced()
                    await of(service).take()
            sizes = [path.stat().st_size for path in sorted((tmp_path / "kept").glob("*.journal"))]
            assert len(sizes) == 7
            assert sum(size >= segments.ROOM_BYTES for size in sizes) == 2, "that of the checkpoint, and the last one"
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert (await begun_from(left))[: 6 * BLOCK] == b"".join(map(noise, range(6)))

    play(story)


@pytest.mark.parametrize("why", ["the copies gave way", "a file is gone"])
def test_a_checkpoint_of_an_unchanged_moment_has_a_segment_of_its_own(tmp_path: Path, why: str) -> None:
    """Nothing was written since the last one, and it is written all the same: what its number leads to goes on."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            if why == "the copies gave way":
                await of(service)._give_way([service._pools["default"].pool])
            else:
                next((tmp_path / "kept").glob("*.stream")).unlink()
            await of(service).take()
            disk(service).write(0, noise(2))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            assert journal(service).status.failures == 0
        async with flushing(left, begun=False) as again:
            assert disk(again).read(0, BLOCK) == noise(2)

    play(story)


def test_a_clone_costs_a_group_next_to_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
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
        async with flushing(left, begun=False) as service:
            assert disk(service, "twin").read(0, 2 * BLOCK) == text(1) + noise(1)

    play(story)


def test_what_is_told_of_an_export_is_of_the_same_moment_as_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with flushing(tmp_path) as service:
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
            held = [one.copy for moment in (last, of(service)._last) if moment for one in moment.kept.values()]
            assert set(export.disk.pool.all_disks()) <= {export.disk, *held}  # copies of the first look are gone

    play(story)


def test_a_write_that_finds_no_room_lets_the_copies_of_the_last_group_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with flushing(tmp_path, pools=(PoolConfig(mem_limit=2 * MIB, durability=Durability.FLUSH),)) as service:
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
        async with flushing(tmp_path, begun=False, pools=pools) as service:
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
        async with flushing(tmp_path):
            pass

    play(story)
    assert "lies in memory, so what is flushed there ends with the power" in caplog.text


def test_a_long_journal_asks_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdzram.server.journal.LONG_BYTES", 8 * BLOCK)

    async def story() -> None:
        async with flushing(tmp_path) as service:
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
        async with flushing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            disk(service).write(0, noise(1))
            spoil(tmp_path / "state" / "default.pool", lambda arena: arena.object_of(1) + 8)
            await journal(service).synced()
            assert journal(service).fails(disk(service))
            assert journal(service).status.usable
            disk(service).write(0, noise(2))  # which mends it
            await journal(service).synced()
            assert not journal(service).fails(disk(service))

    play(story)
    assert "block 0 is not what was written" in caplog.text
    assert "its FLUSH fails" in caplog.text


def test_what_lies_before_rot_is_not_written_with_each_flush_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until somebody writes the block."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()
    written: list[int] = []
    write_at, rotten = segments.SegmentFile.write_at, 3 * MIB

    def count(file: segments.SegmentFile, position: int, content: bytes) -> None:
        written.append(len(content))
        write_at(file, position, content)

    monkeypatch.setattr(segments.SegmentFile, "write_at", count)

    async def story() -> None:
        async with flushing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            await service.changes.add_export("other", MIB, **ADDED)
            disk(service).write(rotten, noise(1))
            await journal(service).synced()
            disk(service).write(0, b"".join(noise(number) for number in range(512)))
            disk(service).write(rotten, noise(2))
            place, number = tmp_path / "state" / "default.pool", disk(service).number
            spoil(place, lambda arena: arena.word_at(rotten // BLOCK, 0, number), 1 << 40)
            await journal(service).synced()
            assert sum(written) > MIB
            written.clear()
            for number in range(3):
                disk(service, "other").write(number * BLOCK, text(number))
                disk(service).write(number * BLOCK, noise(number + 1))
                await journal(service).synced()
                assert journal(service).status.held_back == ("disk",)
            assert sum(written) < MIB // 4
            disk(service).write(rotten, noise(3))
            await journal(service).synced()
            held = whole(disk(service))
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert await begun_from(left) == held

    play(story)


def test_rot_that_is_there_before_the_journal_fails_the_flush_that_would_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint stands until the block is written again; then one does by itself."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    monkeypatch.setattr(checkpoints_module, "AGAIN_SECONDS", 0.01)
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with flushing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            disk(service).write(0, noise(1))
        spoil(tmp_path / "state" / "default.pool", lambda arena: arena.object_of(1) + 8)
        async with flushing(tmp_path / "kept", begun=False, state_dir=tmp_path / "state") as service:
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
        async with flushing(left, begun=False) as service:
            assert disk(service).read(0, BLOCK) == noise(2)

    play(story)


def test_a_state_directory_on_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: False)

    async def story() -> None:
        with pytest.raises(UserError, match=r"the state directory .* lies on a disk"):
            async with flushing(tmp_path / "kept", state_dir=tmp_path / "state"):
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
            async with flushing(tmp_path / "there", state_dir=tmp_path):
                raise AssertionError

    play(story)


def test_the_state_directory_by_another_path_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount has a path of its own, which leads nowhere else."""
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)  # as if the link were one
    (tmp_path / "there").symlink_to(tmp_path)
    assert is_same(tmp_path / "there", tmp_path)
    assert not is_same(tmp_path / "there", tmp_path.parent)
    assert is_same(tmp_path / "no", tmp_path / "no")


def test_files_that_somebody_took_away_are_none_to_let_go(tmp_path: Path) -> None:
    """Between two looks at the directory."""
    (tmp_path / "00000002.journal").write_bytes(b"")
    segments.retire_segments(tmp_path, [1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [segments.SPARE]


def test_a_file_of_the_journal_has_its_name_once_its_head_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = note_syncs(monkeypatch)
    segments.begin_segment(tmp_path, 3, bytes(16)).close()
    assert done == ["sync 00000003.new", "rename 00000003.new 00000003.journal", f"sync {tmp_path.name}"]
