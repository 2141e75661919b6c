"""A server that begins from what the journal has goes on with it: nobody waits for a checkpoint."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdzram.config import CheckpointConfig, ExportConfig, UnixAddress
from nbdzram.errors import UserError
from nbdzram.machine import Machine
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import segments
from nbdzram.server.checkpoints import Checkpoints
from nbdzram.server.claim import Claim
from nbdzram.server.handover import Handover
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME
from nbdzram.stream.journal import Segment
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    ADDED,
    AS_IT_IS,
    MIB,
    NEVER,
    Gate,
    Platter,
    as_the_power_left_it,
    begun_from,
    checkpointing,
    disk,
    files,
    flushing,
    flushing_config,
    journal,
    of,
    play,
    whole,
)


async def left_behind(tmp_path: Path) -> Path:
    """A checkpoint, and a journal of two groups."""
    async with flushing(tmp_path / "kept") as service:
        for number in range(2):
            disk(service).write(number * BLOCK, text(number))
            await journal(service).synced()
        return as_the_power_left_it(tmp_path / "kept", tmp_path / "left")


async def waits(service: Service, gate: Gate) -> bool:
    """Whether a flush is answered by nothing but a checkpoint, which is let through now."""
    flush = asyncio.ensure_future(journal(service).synced())
    assert await asyncio.to_thread(gate.reached.wait, 60)
    waited = not journal(service).status.usable
    assert not (waited and flush.done())
    gate.opened.set()
    await flush
    return waited


def test_behind_a_start_a_flush_is_answered_before_a_checkpoint_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        left = await left_behind(tmp_path)
        gate = Gate(monkeypatch)
        async with flushing(left, begun=False) as service:
            disk(service).write(2 * BLOCK, noise(2))
            await service.changes.add_export("other", MIB, **ADDED)
            disk(service, "other").write(0, noise(3))
            await journal(service).synced()
            assert await asyncio.to_thread(gate.reached.wait, 60), "and one is taken at once"
            assert len(list(left.glob("*.stream"))) == 1, "none stands yet"
            cut = as_the_power_left_it(left, tmp_path / "cut")
            gate.opened.set()
        async with flushing(cut, begun=False) as service:
            assert whole(disk(service))[: 3 * BLOCK] == text(0) + text(1) + noise(2)
            assert disk(service, "other").read(0, BLOCK) == noise(3)

    play(story)


def test_servers_that_end_before_a_checkpoint_stands_lose_nothing_and_leave_no_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        left = await left_behind(tmp_path)
        for number in range(2, 8):
            with monkeypatch.context() as patch:
                gate = Gate(patch)
                async with flushing(left, begun=False) as service:
                    if number % 2:
                        disk(service).write(number * BLOCK, noise(number))
                        await journal(service).synced()
                    left = as_the_power_left_it(left, tmp_path / f"left-{number}")
                    gate.opened.set()
        assert len(list(left.glob("*.journal"))) == 4, "that of the checkpoint, and of each that had a group"
        held = await begun_from(left)
        assert held[: 8 * BLOCK] == b"".join(
            text(at) if at < 2 else noise(at) if at % 2 else bytes(BLOCK) for at in range(8)
        )

    play(story)


def test_what_is_declared_otherwise_at_a_start_is_in_the_first_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await service.changes.add_export("other", MIB, **ADDED)
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        with monkeypatch.context() as patch:
            gate = Gate(patch)
            async with flushing(left, begun=False) as service:
                await service.changes.change_export("other", **{**AS_IT_IS, "read_only": True})
                await service.changes.resize_export("disk", 8 * MIB, yes=False, force=False)
                disk(service).write(7 * MIB, noise(1))
                await journal(service).synced()
                cut = as_the_power_left_it(left, tmp_path / "cut")
                gate.opened.set()
        async with flushing(cut, begun=False) as service:
            assert disk(service).read(7 * MIB, BLOCK) == noise(1)
            assert service._exports.get("other").read_only

    play(story)


async def never(_: Checkpoints) -> None:
    """Takes no checkpoint, whose group would be the first."""


def test_what_only_a_declaration_says_is_in_the_first_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was changed since the start, and the exports are those that the journal has."""

    async def story() -> None:
        left = await left_behind(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "take", never)
            declared = ExportConfig(name="disk", size_bytes=4 * MIB, description="declared otherwise")
            async with flushing(left, begun=False, exports=(declared,)) as service:
                await journal(service).synced()
                cut = as_the_power_left_it(left, tmp_path / "cut")
        async with flushing(cut, begun=False, exports=()) as service:
            assert service._exports.get("disk").description == "declared otherwise"

    play(story)


def test_an_export_that_was_removed_alone_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        left = await left_behind(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "take", never)
            async with flushing(left, begun=False) as service:
                await service.changes.remove_export("disk", force=False)
                await journal(service).synced()
                cut = as_the_power_left_it(left, tmp_path / "cut")
        async with flushing(cut, begun=False, exports=()) as service:
            assert list(service._exports) == []

    play(story)


@pytest.mark.parametrize("why", ["it is damaged", "it cannot be synced", "the newest checkpoint was passed over"])
def test_where_something_is_missing_a_flush_waits_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What were written behind it, no later start would find."""

    async def story() -> None:
        left = await left_behind(tmp_path)
        held = text(0) + text(1)
        if why == "it is damaged":
            path = left / "00000001.journal"
            first, _ = Segment(path).groups()
            content = bytearray(path.read_bytes())
            content[first.start + 100] ^= 1
            path.write_bytes(content)
            held = bytes(2 * BLOCK)
        elif why == "the newest checkpoint was passed over":
            shutil.copy(left / "00000001-full.stream", left / "00000002-full.stream")
            with (left / "00000002-full.stream").open("r+b") as file:
                file.truncate(100)
        platter = Platter(monkeypatch)
        platter.error = errno.EIO if why == "it cannot be synced" else 0
        gate = Gate(monkeypatch)
        async with flushing(left, begun=False) as service:
            platter.error = 0
            disk(service).write(2 * BLOCK, noise(2))
            assert await waits(service, gate)
            cut = as_the_power_left_it(left, tmp_path / "cut")
        assert (await begun_from(cut))[: 3 * BLOCK] == held + noise(2)

    play(story)


def test_a_journal_is_written_once_more_before_another_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was killed may have left a group in the kernel's memory alone; and behind a sync that failed no
    later one says that the disk has it."""
    done: list[str] = []

    async def story() -> None:
        left = await left_behind(tmp_path)
        path = left / "00000001.journal"
        before, known = path.stat().st_ino, [group.head for group in Segment(path).groups()]
        sync, begin = os.fdatasync, segments.begin_segment

        def fdatasync(descriptor: int) -> None:
            done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            sync(descriptor)

        def go_on(directory: Path, number: int, since: bytes) -> segments.SegmentFile:
            done.append("go on")
            return begin(directory, number, since)

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        monkeypatch.setattr("nbdzram.server.journal.begin_segment", go_on)
        async with flushing(left, begun=False):
            assert done[:2] == ["00000001.new", "go on"]
            assert path.stat().st_ino != before, "what it was is not written over"
            assert [group.head for group in Segment(path).groups()] == known
            assert not path.with_suffix(".new").exists()

    play(story)


def test_a_file_that_reads_otherwise_than_it_did_is_not_gone_on_behind(tmp_path: Path) -> None:
    """The kernel may have let go what it kept, and the disk have less."""

    async def story() -> None:
        path = await left_behind(tmp_path) / "00000001.journal"
        first, second = Segment(path).groups()
        content = bytearray(path.read_bytes())
        content[second.start + 100] ^= 1
        path.write_bytes(content)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            segments.write_again(path, second.start + 4096)
        assert path.read_bytes() == bytes(content)
        assert not path.with_suffix(".new").exists()
        segments.write_again(path, second.start)
        assert [group.head for group in Segment(path).groups()] == [first.head]

    play(story)


def test_a_journal_that_cannot_go_on_waits_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        left = await left_behind(tmp_path)
        gate = Gate(monkeypatch)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("nbdzram.server.journal.begin_segment", full)
            serving = flushing(left, begun=False)
            service = await serving.__aenter__()
        assert len(service._pools["default"].pool.all_disks()) == 1, "no copy is kept in vain"
        disk(service).write(2 * BLOCK, noise(2))
        assert await waits(service, gate)
        await serving.__aexit__(None, None, None)
        assert (await begun_from(left))[: 3 * BLOCK] == text(0) + text(1) + noise(2)

    play(story)
    assert "does not go on, so FLUSH waits for a whole checkpoint: No space left on device" in caplog.text


@pytest.mark.parametrize("beside_state", [False, True])
def test_a_journal_that_nobody_waits_for_any_more_goes_with_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside_state: bool
) -> None:
    """What was said of exports beside it holds on."""
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)

    async def story() -> None:
        left = await left_behind(tmp_path)
        assert (left / FILE_NAME).exists()
        state_dir = left if beside_state else None
        async with checkpointing(left, state_dir=state_dir) as service:
            assert whole(disk(service))[: 2 * BLOCK] == text(0) + text(1)
            assert (left / "00000001.journal").exists()
            await of(service).take()
            found = {path.name for path in left.iterdir()} - {"default.pool", "audit.log", "history"}
            stays = {"00000001-full.stream", "00000002-full.stream", FILE_NAME}
            if beside_state:  # what lies there may be this server's own
                stays |= {"00000001.journal"}
            assert {name for name in found if not name.startswith("lock")} >= stays
            assert ("00000001.journal" in found) == beside_state

    play(story)


def test_a_start_that_fails_behind_it_leaves_no_file_open(tmp_path: Path) -> None:
    def open_files() -> list[str]:
        return [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()]

    async def story() -> None:
        left = await left_behind(tmp_path)
        with pytest.raises(UserError):
            await Service(flushing_config(left, unix=listening(tmp_path / "nowhere"))).start()
        assert not [path for path in open_files() if path.startswith(str(left))]
        assert (await begun_from(left))[: 2 * BLOCK] == text(0) + text(1)

    play(story)


# ---- takeovers ----


async def successor(service: Service, directory: Path) -> Service:
    """The next process, with what this one gave away; its checkpoints go to `directory`."""
    service._nbd.prepare_to_hand_over()
    given, taken = socket.socketpair()
    with given, taken:
        ours = await service.hand_over()
        giving = asyncio.create_task(asyncio.to_thread(ours.give, given))
        handed = await asyncio.to_thread(Handover.take, taken)
        await giving
        ours.close()
    config = replace(service.config, checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER))
    following = Service(config, handed=handed)
    await following.start(listen=False)
    return following


def listening(place: Path) -> tuple[UnixAddress, ...]:
    return (UnixAddress(path=place / "socket"),)


@pytest.mark.parametrize("where", ["the same directory", "another one", "where somebody else was"])
def test_behind_a_takeover_the_journal_goes_on_where_nobody_else_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def story() -> None:
        kept, other = tmp_path / "kept", tmp_path / "other"
        service = Service(flushing_config(kept, unix=listening(tmp_path)))
        await service.start()
        await service.changes.add_export("gone", MIB, **ADDED)
        disk(service).write(0, text(0))
        await journal(service).synced()
        await service.changes.remove_export("gone", force=False)
        finish = of(service).finish
        written: list[bytes] = []

        async def write_behind_it() -> None:
            await finish()
            written.append(text(1 + len(written)))
            disk(service).write(BLOCK, written[-1])  # which nobody flushed

        monkeypatch.setattr(of(service), "finish", write_behind_it)
        gate = Gate(monkeypatch)
        if where == "where somebody else was":
            close = of(service).place.release
            monkeypatch.setattr(of(service).place, "release", lambda: (close(), shutil.copy(*newest(kept))))
        following = await successor(service, other if where == "another one" else kept)
        await following.listen()
        disk(following).write(2 * BLOCK, noise(2))
        if where == "the same directory":
            await journal(following).synced()
            assert not gate.opened.is_set()
            cut = as_the_power_left_it(kept, tmp_path / "cut")
            gate.opened.set()
        else:
            assert await waits(following, gate)
            cut = as_the_power_left_it(other if where == "another one" else kept, tmp_path / "cut")
        await following.stop()
        async with flushing(cut, begun=False) as again:
            assert whole(disk(again))[: 3 * BLOCK] == text(0) + written[-1] + noise(2)
            assert [export.name for export in again._exports] == ["disk"]

    play(story)


def test_clients_of_a_takeover_do_not_wait_for_what_they_wrote_before_it(tmp_path: Path) -> None:
    """Gigabytes, where nobody flushes."""

    async def story() -> None:
        service = Service(flushing_config(tmp_path / "kept", unix=listening(tmp_path)))
        await service.start()
        await journal(service).synced()
        async with of(service)._turn:
            pass  # and what the first checkpoint leads to has ended
        disk(service).write(0, noise(0))
        come_to_rest, groups = service._nbd.hand_over, []

        async def note() -> Handover:
            groups.append(journal(service).status.groups)
            return await come_to_rest()

        service._nbd.hand_over = note  # type: ignore[method-assign]
        following = await successor(service, tmp_path / "kept")
        await following.listen()
        await following.stop()
        assert groups == [1]

    play(story)


def test_a_journal_does_not_go_on_in_a_directory_that_another_server_has(tmp_path: Path) -> None:
    """Who comes back where nobody took over serves all the same, and each checkpoint tries again."""

    async def story() -> None:
        kept = tmp_path / "kept"
        service = Service(flushing_config(kept, unix=listening(tmp_path)))
        await service.start()
        disk(service).write(0, text(0))
        await journal(service).synced()
        service._nbd.prepare_to_hand_over()
        handed, another = await service.hand_over(), Claim(kept)
        another.take()
        before = files(kept)
        back = Service(service.config, handed=handed)
        await back.start(listen=False)
        await back.listen()
        assert files(kept) == before
        assert not journal(back).status.usable
        assert len(back._pools["default"].pool.all_disks()) == 1
        another.release()
        await of(back).take()
        disk(back).write(BLOCK, text(1))
        await journal(back).synced()
        cut = as_the_power_left_it(kept, tmp_path / "cut")
        await back.stop()
        assert (await begun_from(cut))[: 2 * BLOCK] == text(0) + text(1)

    play(story)


def test_a_first_checkpoint_for_which_there_is_no_room_leaves_the_journal_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried all the same once that has died of it: there may be room for it."""

    async def story() -> None:
        left = await left_behind(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=1, f_bavail=0, f_frsize=BLOCK))
        monkeypatch.setattr(checkpoints_module, "AGAIN_SECONDS", NEVER)
        platter = Platter(monkeypatch)
        async with flushing(left, begun=False) as service:
            await of(service).take()
            assert len(list(left.glob("*.stream"))) == 1
            disk(service).write(2 * BLOCK, noise(2))
            await journal(service).synced()
            platter.error = errno.ENOSPC
            disk(service).write(3 * BLOCK, noise(3))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                await journal(service).synced()
            platter.error = 0
            await of(service).take()
            await journal(service).synced()
            assert len(list(left.glob("*.stream"))) == 2
            disk(service).write(4 * BLOCK, text(4))
            await of(service).take()
            assert "since" in max(left.glob("*.stream")).name, "what changed finds room"

    play(story)


def test_a_first_checkpoint_needs_no_room_for_pages_that_are_nearly_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as pools take was wanted, and the journal grew until it died of it."""

    async def story() -> None:
        left = await left_behind(tmp_path)
        async with flushing(left, begun=False) as service:
            for number in range(64):
                disk(service).write(number * BLOCK, noise(number)[: BLOCK // 4].ljust(BLOCK, b"\0"))
            for number in range(64):
                if number % 8:
                    disk(service).trim(number * BLOCK, BLOCK)
            await journal(service).synced()
            monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=1, f_bavail=4, f_frsize=BLOCK))
            await of(service).take()
            assert len(list(left.glob("*.stream"))) == 2

    play(story)


def newest(directory: Path) -> tuple[Path, Path]:
    """A checkpoint, and the name of a later one."""
    found = max(directory.glob("*.stream"))
    return found, directory / "00000009-full.stream"
