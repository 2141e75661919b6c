"""Checkpoints: written while clients write, one told from the other, and away when they are not needed."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from nbdzram.config import PoolConfig
from nbdzram.errors import PoolFull, UserError
from nbdzram.machine import Machine
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server.checkpoints import Checkpoints
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.conftest import note_syncs
from tests.unit.server.lasting import (
    ADDED,
    MIB,
    Gate,
    as_the_power_left_it,
    checkpointing,
    disk,
    files,
    of,
    play,
    spoil,
    whole,
)


def test_what_changed_is_written_and_what_did_not_is_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(200)))
            await of(service).take()
            disk(service).write(7 * BLOCK, noise(999))
            await of(service).take()
            await of(service).take()
            assert files(tmp_path) == ["00000001-full.stream", "00000002-since-00000001.stream"]
            sizes = [(tmp_path / name).stat().st_size for name in files(tmp_path)]
            assert sizes[0] > 200 * BLOCK
            assert sizes[1] < 2 * BLOCK
            await service.changes.resize_export("disk", 8 * MIB, yes=False, force=False)
            await of(service).take()  # no block of it, but a size
            assert files(tmp_path)[2] == "00000003-since-00000002.stream"

    play(story)


def test_an_orderly_stop_takes_the_last_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, text(5))
        async with checkpointing(tmp_path) as service:
            assert disk(service).read(0, BLOCK) == text(5)

    play(story)


def test_a_chain_ends_and_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 2)

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100, 160)))
            for number in range(7):
                disk(service).write(0, b"".join(noise(1000 * number + block) for block in range(3)))
                await of(service).take()
            assert files(tmp_path) == [
                "00000005-full.stream",
                "00000006-since-00000005.stream",
                "00000007-full.stream",
            ]

    play(story)


def test_a_whole_one_stands_though_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And those behind it tell what changed since it, so that a start can read them."""
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 1)

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100, 160)))
            await of(service).take()
            disk(service).write(0, text(1))
            with monkeypatch.context() as patch:
                patch.setattr(Checkpoints, "_forget", refused)
                await of(service).take()
            monkeypatch.undo()
            disk(service).write(BLOCK, text(2))
            await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert told.failures == 0
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert "00000003-since-00000002.stream" in files(left)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 2 * BLOCK) == text(1) + text(2)

    play(story)
    assert "stay until the next whole one: Input/output error" in caplog.text


def test_a_chain_ends_when_what_changed_is_more_than_the_whole(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            for number in range(4):
                disk(service).write(0, b"".join(noise(1000 * number + block) for block in range(9)))
                await of(service).take()
            names = [name.split("-")[1].removesuffix(".stream") for name in files(tmp_path)]
            assert names == ["full", "since", "full", "since"]

    play(story)


def test_a_file_has_its_name_once_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, text(1))
            done = note_syncs(monkeypatch)
            await of(service).take()
            monkeypatch.undo()
            fresh, place = "00000001-full.new", f"sync {tmp_path.name}"
            assert done[:5] == [
                "sync changes.new",
                place,
                f"sync {fresh}",
                f"rename {fresh} 00000001-full.stream",
                place,
            ]

    play(story)


def test_a_checkpoint_that_fails_is_counted_and_the_next_one_holds_what_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await of(service).take()

            def is_full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            disk(service).write(BLOCK, text(2))
            with monkeypatch.context() as patch:
                patch.setattr(checkpoints_module, "_write_all", is_full)
                await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert told.failures == 1
            assert files(tmp_path / "kept") == ["00000001-full.stream"]
            disk(service).write(2 * BLOCK, text(3))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert disk(service).read(0, 3 * BLOCK) == text(1) + text(2) + text(3)

    play(story)
    full = (
        f"a checkpoint failed: {tmp_path / 'kept'}: No space left on device; make room there: a whole one takes about "
    )
    assert full in caplog.text


def test_copies_give_way_to_a_write_that_finds_no_room(tmp_path: Path) -> None:
    async def story() -> None:
        pools = (PoolConfig(mem_limit=2 * MIB),)
        async with checkpointing(tmp_path, pools=pools) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            await of(service).take()
            with pytest.raises(PoolFull):
                disk(service).write(0, b"".join(noise(1000 + number) for number in range(300)))
            while len(service._pools["default"].pool.all_disks()) > 1:  # noqa: ASYNC110 - a condition of the engine
                await asyncio.sleep(0.01)
            disk(service).write(0, b"".join(noise(1000 + number) for number in range(300)))
            await of(service).take()
            assert "00000002-full.stream" in files(tmp_path)

    play(story)


def test_a_stop_waits_for_the_checkpoint_under_way_and_takes_the_last_one_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, b"".join(map(noise, range(100))))
            await of(service).take()
            disk(service).write(0, text(2))
            gate = Gate(monkeypatch)
            taking = asyncio.create_task(of(service).take())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            disk(service).write(0, text(3))

            async def open_it() -> None:
                beat = of(service)._task
                assert beat is not None
                while not beat.done():  # noqa: ASYNC110 - until the stop is under way
                    await asyncio.sleep(0.01)
                gate.opened.set()

            opening = asyncio.create_task(open_it())
        await asyncio.gather(taking, opening)
        assert files(tmp_path)[1:] == [
            "00000002-since-00000001.stream",
            "00000003-since-00000002.stream",
        ], "the last one tells what changed since the one that was under way"
        async with checkpointing(tmp_path) as service:
            assert disk(service).read(0, BLOCK) == text(3)

    play(story)


def test_a_checkpoint_under_way_gives_way_to_a_write_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path, pools=(PoolConfig(mem_limit=2 * MIB),)) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            gate = Gate(monkeypatch)
            taking = asyncio.create_task(of(service).take())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            with pytest.raises(PoolFull):
                disk(service).write(0, b"".join(noise(1000 + number) for number in range(300)))
            gate.opened.set()
            await taking
            disk(service).write(0, b"".join(noise(1000 + number) for number in range(300)))
            assert files(tmp_path) == []

    play(story)
    assert "a checkpoint failed: a write found no room" in caplog.text


def test_a_full_pool_costs_no_other_its_copies(tmp_path: Path) -> None:
    """What a pool refused that is there no more says nothing of the others."""

    async def story() -> None:
        pools = tuple(PoolConfig(name=name, mem_limit=2 * MIB) for name in ("default", "small"))
        async with checkpointing(tmp_path / "kept", pools=pools) as service:

            def overfill(name: str) -> None:
                with pytest.raises(PoolFull):
                    disk(service, name).write(0, b"".join(noise(1000 + number) for number in range(600)))

            await service.changes.add_pool("gone", 2 * MIB, "fold")
            for name in ("small", "gone"):
                await service.changes.add_export(name, 4 * MIB, **{**ADDED, "pool": name})
            disk(service).write(0, b"".join(noise(number) for number in range(200)))
            overfill("gone")
            refused = of(service)._refused()
            await service.changes.remove_export("gone", force=False)
            await service.changes.remove_pool("gone")
            assert of(service)._full_since(refused) == set()
            await of(service).take()
            overfill("small")
            small = service._pools["small"].pool
            assert of(service)._full_since(refused) == {small}
            while len(small.all_disks()) > 1:  # noqa: ASYNC110 - a condition of the engine
                await asyncio.sleep(0.01)
            disk(service).write(0, noise(9))
            held = {export.name: whole(export.disk) for export in service._exports}
            await of(service).take()
            kept = {name: (tmp_path / "kept" / name).stat().st_size for name in files(tmp_path / "kept")}
            assert list(kept) == ["00000001-full.stream", "00000002-since-00000001.stream"]
            assert kept["00000002-since-00000001.stream"] < sum(map(len, held.values())) // 3
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left, pools=pools) as service:
            assert {export.name: whole(export.disk) for export in service._exports} == held

    play(story)


class Watched:
    """A pool of which nothing but the count of refused writes can be asked."""

    def __init__(self) -> None:
        self.looks = 0

    @property
    def failed_writes(self) -> int:
        self.looks += 1
        return 0


def test_beside_a_full_pool_every_other_checkpoint_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that tries again and again would keep all others without a checkpoint, and their flushes waiting."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", pools=(PoolConfig(mem_limit=2 * MIB),)) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            checkpoints = of(service)

            def refused_again(file: BinaryIO, content: bytes) -> None:
                with pytest.raises(PoolFull):
                    disk(service).write(0, b"".join(noise(1000 + number) for number in range(600)))
                file.write(content)

            monkeypatch.setattr(checkpoints_module, "_write_all", refused_again)
            outcomes = []
            for _ in range(4):
                await checkpoints.take()
                outcomes.append(len(files(tmp_path / "kept")))
            assert outcomes == [0, 1, 1, 2]

    play(story)


def test_rot_costs_its_block_and_no_later_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole one would meet it; what changed is told without, until it is written again."""
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 2)
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()

    async def story() -> None:
        kept = tmp_path / "kept"
        async with checkpointing(kept, state_dir=tmp_path / "state") as service:
            disk(service).write(MIB, noise(1))
            disk(service).write(3 * MIB, b"".join(noise(number) for number in range(100, 160)))
            await of(service).take()
            spoil(tmp_path / "state" / "default.pool", lambda arena: arena.object_of(1) + 8)
            for number in range(4):
                disk(service).write(2 * MIB, text(number))
                await of(service).take()
            assert files(kept)[-1] == "00000005-since-00000004.stream"
            assert caplog.text.count("no whole checkpoint can be written") == 2, "each time the chain was long again"
            left = as_the_power_left_it(kept, tmp_path / "left")
            disk(service).write(MIB, noise(2))
            disk(service).write(2 * MIB, text(9))
            for number in range(2):
                await of(service).take()
                disk(service).write(2 * MIB, text(10 + number))
            assert files(kept)[-1] == "00000007-full.stream"
        async with checkpointing(left) as service:
            assert disk(service).read(2 * MIB, BLOCK) == text(3)
            assert disk(service).read(MIB, BLOCK) == noise(1), "as it was before"

    play(story)


@pytest.mark.parametrize("found", ["before", "meanwhile"])
def test_where_there_is_no_room_for_another_whole_one_the_chain_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """What changes finds some. Each checkpoint failed from then on, and beside a journal that took the last of it."""
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 2)
    write = checkpoints_module._write_all

    def fills(file: BinaryIO, content: bytes) -> None:
        if len(content) > MIB // 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    async def story() -> None:
        kept = tmp_path / "kept"
        async with checkpointing(kept) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            await of(service).take()
            with monkeypatch.context() as patch:
                if found == "before":
                    patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=1, f_bavail=255, f_frsize=BLOCK))
                else:
                    patch.setattr(checkpoints_module, "_write_all", fills)
                for number in range(4):
                    disk(service).write(2 * MIB, text(number))
                    await of(service).take()
            assert files(kept)[-1] == "00000005-since-00000004.stream"
            told = service.status().checkpoint
            assert told is not None
            assert told.failures == 0
            left = as_the_power_left_it(kept, tmp_path / "left")
            for number in range(2):
                disk(service).write(2 * MIB, text(10 + number))
                await of(service).take()
            assert files(kept)[-1] == "00000007-full.stream"
        async with checkpointing(left) as service:
            assert disk(service).read(2 * MIB, BLOCK) == text(3)

    play(story)


def test_a_whole_one_needs_no_room_for_what_was_trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the one before it was wanted: the chain went on for good, and what lies there kept its room."""
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 1)

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(64)))
            await of(service).take()
            monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=1, f_bavail=8, f_frsize=BLOCK))
            disk(service).trim(BLOCK, 63 * BLOCK)
            await of(service).take()
            assert files(tmp_path)[-1] == "00000002-since-00000001.stream", "the copies of the first have it still"
            disk(service).write(0, text(1))
            await of(service).take()
            assert files(tmp_path)[-1] == "00000003-full.stream"

    play(story)


@pytest.mark.parametrize("tells", ["nothing", "an error"])
def test_a_file_system_that_does_not_tell_its_room_has_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: str
) -> None:
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 1)

    def told(_: Path) -> SimpleNamespace:
        if tells == "an error":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=BLOCK)

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            await of(service).take()
            monkeypatch.setattr(os, "statvfs", told)
            disk(service).write(0, text(1))
            await of(service).take()
            assert files(tmp_path)[-1] == "00000002-full.stream"

    play(story)


def test_an_export_that_was_removed_last_does_not_come_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept", exports=()) as service:
            await of(service).take()
            assert files(tmp_path / "kept") == [], "there is nothing to keep"
            await service.changes.add_export("only", MIB, **ADDED)
            await of(service).take()
            await service.changes.remove_export("only", force=False)
        async with checkpointing(tmp_path / "kept", exports=()) as service:
            assert list(service._exports) == []

    play(story)


def test_what_could_not_be_removed_when_it_failed_is_in_nobodys_way(tmp_path: Path) -> None:
    """Its file system could not be written for a while; the server went on, and gives that room back."""

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            for left in ("00000001-full.new", "00000000-full.new", "00000000.new"):
                (tmp_path / left).write_bytes(b"half of a longer one" * 4096)
            disk(service).write(0, text(1))
            await of(service).take()
            assert files(tmp_path) == ["00000001-full.stream"]
        async with checkpointing(tmp_path) as service:
            assert disk(service).read(0, BLOCK) == text(1)

    play(story)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path or not mode & os.W_OK
    )  # root may write anything

    async def story() -> None:
        async with checkpointing(tmp_path):
            raise AssertionError

    with pytest.raises(UserError, match=r"it may not be written by user \d+, or its file system is read-only"):
        play(story)


def test_a_checkpoint_looks_at_one_counter_for_each_record(tmp_path: Path) -> None:
    """All of a pool's counters would be a walk under its lock, which takes from writers what they have at hand."""

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, b"".join(noise(number) for number in range(300)))
            watched: Any = Watched()
            of(service)._pools = {"default": SimpleNamespace(pool=watched)}  # type: ignore[dict-item]
            await of(service).take()
            assert files(tmp_path) == ["00000001-full.stream"]
            assert watched.looks > 5, "the records of a header, a pool, an export, objects, blocks and the end"

    play(story)


def test_two_servers_do_not_share_a_directory(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            disk(service).write(0, text(1))
            with pytest.raises(UserError, match=r"another server keeps its checkpoints in .*; stop it, or give"):
                async with checkpointing(tmp_path):
                    pass
            await of(service).take()
            assert files(tmp_path) == ["00000001-full.stream"]
        async with checkpointing(tmp_path) as service:  # who stopped has it no more
            assert disk(service).read(0, BLOCK) == text(1)

    play(story)


def test_behind_a_directory_that_was_removed_the_next_one_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await of(service).take()
            disk(service).write(BLOCK, text(2))
            await of(service).take()
            shutil.rmtree(tmp_path / "kept")
            await of(service).take()  # also if nothing changed: what there is is gone
            assert files(tmp_path / "kept") == ["00000003-full.stream"]
            with pytest.raises(UserError, match="another server keeps its checkpoints"):
                async with checkpointing(tmp_path / "kept"):
                    pass
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert disk(service).read(0, 2 * BLOCK) == text(1) + text(2)

    play(story)
    assert "is another directory than it was" in caplog.text


def test_behind_a_file_that_was_removed_the_next_one_is_whole(tmp_path: Path) -> None:
    """What would have been told since it could never be read."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            disk(service).write(MIB, b"".join(noise(number) for number in range(100)))
            for number in range(3):
                disk(service).write(number * BLOCK, text(number))
                await of(service).take()
            (tmp_path / "kept" / "00000002-since-00000001.stream").unlink()
            disk(service).write(3 * BLOCK, text(3))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            assert "00000004-full.stream" in files(left)
        async with checkpointing(left) as service:
            assert disk(service).read(0, 4 * BLOCK) == b"".join(text(number) for number in range(4))

    play(story)


def test_a_server_that_began_from_a_checkpoint_tells_its_moment_until_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            first = of(service).status
            assert first is not None
            assert first.moment is None
            disk(service).write(0, b"a")
            await of(service).take()
            status = of(service).status
            assert status is not None
            moment = status.moment
        left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            status = of(service).status
            assert status is not None
            assert moment is not None
            assert status.moment is not None
            assert moment <= status.moment < moment + 3600

    play(story)
