"""A bit that flips in what one export is costs no other export its flush, nor anybody what was flushed before."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import UnixAddress
from nbdzram.errors import UserError
from nbdzram.machine import Machine
from nbdzram.nbd.constants import Error
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server import rollback
from nbdzram.server.handover import FORMAT, KNOWS
from nbdzram.server.service import Service
from nbdzram.stream.journal import Segment
from tests.support.arena import BRANCHES, CURRENT_AT, HEAD_SIZE, HEADS_AT, NAME_AT, Arena
from tests.support.loop_client import WireClient
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    AS_IT_IS,
    EXPORTS,
    MIB,
    Gate,
    Platter,
    asked,
    behind_a_power_cut,
    checkpointing,
    disk,
    files,
    flushing,
    flushing_config,
    journal,
    keep,
    of,
    of_size,
    open_here,
    play,
    spoil,
    whole,
)

NAMES = (b"disk", b"other")
FLUSH = 3


@pytest.fixture(autouse=True)
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()


def spoil_disk(
    tmp_path: Path, service: Service, place_of: Callable[[Arena, int], int], bits: int, name: str = "disk"
) -> None:
    number = disk(service, name).number
    spoil(tmp_path / "state" / "default.pool", lambda arena: place_of(arena, number), bits)


def head(arena: Arena, export: int) -> int:
    at = arena.entry(export)
    return at + HEADS_AT + (arena.word(at + CURRENT_AT) >> 16 & 1) * HEAD_SIZE


ENTRY: dict[str, tuple[Callable[[Arena, int], int], int]] = {
    "name": (lambda arena, export: arena.entry(export) + NAME_AT, 1),
    "state": (head, 2),
    "flags": (head, 1 << 40),
    "size": (lambda arena, export: head(arena, export) + 8, 1 << 13),
    "generation": (lambda arena, export: head(arena, export) + 24, 1),
    "current": (lambda arena, export: arena.entry(export) + CURRENT_AT, 1 << 40),
    "which head": (lambda arena, export: arena.entry(export) + CURRENT_AT, 1 << 16),
}
"""Of an entry of the export directory: words, and the bits that flip there."""
ROOT = (lambda arena, export: arena.root(export)), 1 << 40


@contextlib.asynccontextmanager
async def with_an_ill_one(tmp_path: Path, opened: Callable[..., Any] = flushing) -> AsyncIterator[Service]:
    """A server of two exports, one of which cannot be read: of `disk` the first block is noise(1) on the disk, and was
    written since.
    """
    async with open_here(opened, tmp_path) as service:
        disk(service).write(0, noise(1))
        await keep(service)
        disk(service).write(0, noise(2))
        spoil_disk(tmp_path, service, *ROOT)
        yield service


@pytest.mark.parametrize("what", ENTRY)
@pytest.mark.parametrize("opened", [flushing, checkpointing])
def test_a_damaged_directory_entry_costs_no_flush_and_no_checkpoint(
    tmp_path: Path,
    what: str,
    opened: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its blocks are right, and the process knows the rest: what outlives the power has an entry that is right."""
    monkeypatch.setattr(checkpoints_module, "LONGEST_CHAIN", 2)

    async def story() -> None:
        async with open_here(opened, tmp_path) as service:
            for name in ("disk", "other"):
                disk(service, name).write(0, noise(1) + noise(2))
            await of(service).take()
            spoil_disk(tmp_path, service, *ENTRY[what])
            for number in range(4):
                for name in ("disk", "other"):
                    disk(service, name).write(number * BLOCK, text(number))
                await of(service).take()
            status = service.status().checkpoint
            assert status is not None
            assert status.failures == 0
            if opened is flushing:
                disk(service).write(9 * BLOCK, text(9))
                await journal(service).synced()
                assert not journal(service).fails(disk(service))
            assert files(tmp_path / "kept")[-1] != "00000001-full.stream"
            held = {name: whole(disk(service, name)) for name in ("disk", "other")}
            assert await behind_a_power_cut(tmp_path, opened) == held

    play(story)
    assert caplog.text.count("the entry of the export 'disk' in the export directory is not what was written") == 1


def test_one_export_that_cannot_be_read_fails_its_own_flush_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal and the checkpoints go on with it as it was; the others are as they are."""

    async def story() -> None:
        async with with_an_ill_one(tmp_path) as service:
            for number in range(3):
                disk(service, "other").write(number * BLOCK, text(number))
                await journal(service).synced()
                assert journal(service).fails(disk(service))
                assert not journal(service).fails(disk(service, "other"))
                await of(service).take()
            told, status = service.status().checkpoint, journal(service).status
            assert (status.usable, status.failures, status.held_back) == (True, 0, ("disk",))
            assert told is not None
            assert told.failures == 0
            await service.changes.change_export("disk", **{**AS_IT_IS, "description": "it is ill"})
            await service.changes.resize_export("disk", 8 * MIB, yes=False, force=False)
            assert "full" in files(tmp_path / "kept")[0]
            left = await behind_a_power_cut(tmp_path)
            assert left["disk"] == of_size(noise(1)), "as it was when it was flushed last"
            assert left["other"] == of_size(text(0) + text(1) + text(2))
            await service.changes.remove_export("disk", force=True)
            await journal(service).synced()
            assert journal(service).status.held_back == ()
            assert await journal(service).reached() is not None

    play(story)
    assert caplog.text.count("it is kept as it was, and its FLUSH fails") == 1


def test_a_group_that_fails_uses_its_number_up(tmp_path: Path) -> None:
    """Checksums go by the number: what it left in the file is not to look like a part of what is written over it."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            disk(service).write(0, noise(2))
            spoil_disk(tmp_path, service, *ROOT)
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            (segment,) = (tmp_path / "kept").glob("*.journal")
            assert [group.head.sequence for group in Segment(segment).groups()] == [1, 3]

    play(story)


def test_what_cannot_be_read_is_not_told_to_whoever_takes_over(tmp_path: Path) -> None:
    """What a successor finds in the pool is not what was flushed."""

    async def story() -> None:
        async with with_an_ill_one(tmp_path) as service:
            await journal(service).synced()
            assert await journal(service).reached() is None
            assert (await behind_a_power_cut(tmp_path))["disk"] == of_size(noise(1))

    play(story)


def test_nobody_takes_over_while_an_export_cannot_be_read(tmp_path: Path) -> None:
    """Who did would have no checkpoint that stands, and answer no FLUSH of anybody."""
    given = {"unix": (UnixAddress(path=tmp_path / "socket"),), "state_dir": tmp_path / "state"}

    async def story() -> None:
        service = Service(flushing_config(tmp_path / "kept", exports=EXPORTS, **given))
        asking = partial(service.takeover, str(tmp_path / "s"), os.getpid(), FORMAT, KNOWS, str(tmp_path / "state"))
        await service.start()
        try:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            spoil_disk(tmp_path, service, *ROOT)
            await journal(service).synced()
            with pytest.raises(UserError, match="its export 'disk' cannot be read"):
                await asking(unit="")
            await asked(service, "exports.remove", name="disk")
            with pytest.raises(UserError, match="nothing can be given to"):  # as nobody listens there
                await asking(unit="")
        finally:
            await service.stop()

    play(story)


@pytest.mark.parametrize("size_bytes", [2 * MIB, 8 * MIB])
def test_what_was_resized_and_cannot_be_read_has_the_size_of_its_copy(tmp_path: Path, size_bytes: int) -> None:
    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            disk(service).write(3 * MIB, noise(3))
            await journal(service).synced()
            held = whole(disk(service))
            disk(service).resize(size_bytes)
            spoil_disk(tmp_path, service, *ROOT)
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            assert journal(service).status.held_back == ("disk",)
            assert await behind_a_power_cut(tmp_path) == {"disk": held, "other": of_size(text(1))}

    play(story)


def test_what_can_be_read_again_is_flushed_again(tmp_path: Path) -> None:
    """A bit that flipped back, and no write since: nothing else says so."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            spoil_disk(tmp_path, service, *ROOT)
            await journal(service).synced()
            assert journal(service).fails(disk(service))
            spoil_disk(tmp_path, service, *ROOT)
            await journal(service).synced()
            assert not journal(service).fails(disk(service))

    play(story)


@pytest.mark.parametrize("level", [1, 2, 4, BRANCHES + 1])
def test_a_copy_that_rots_is_in_nobodys_way(tmp_path: Path, level: int) -> None:
    """The disk is sound; of what it was flushed last nobody here knows everything any more, so all of it is told."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            disk(service).write(2 * MIB, noise(7))
            await journal(service).synced()
            last = journal(service)._last
            assert last is not None
            copy = last.kept[disk(service)].copy.number
            disk(service).write(0, noise(2))
            disk(service).trim(2 * MIB, BLOCK)

            def word(arena: Arena) -> int:
                return arena.root(copy) if level > BRANCHES else arena.word_at(0, level, copy)

            spoil(tmp_path / "state" / "default.pool", word, 1 << 40)
            await journal(service).synced()
            assert not journal(service).fails(disk(service))
            assert (await behind_a_power_cut(tmp_path))["disk"] == of_size(noise(2))
            await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert told.failures == 0
            assert (await behind_a_power_cut(tmp_path))["disk"] == of_size(noise(2))

    play(story)


def test_beside_a_journal_no_checkpoint_takes_back_what_was_flushed(tmp_path: Path) -> None:
    """Rot came between the flush and the checkpoint: the journal alone has what was flushed, and keeps it."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            disk(service).write(0, noise(2))
            await journal(service).synced()
            copy = journal(service)._last
            assert copy is not None
            number = copy.kept[disk(service)].copy.number
            spoil(tmp_path / "state" / "default.pool", lambda arena: arena.word_at(0, 0, number), 1 << 40)
            await of(service).take()
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            assert await behind_a_power_cut(tmp_path) == {"disk": of_size(noise(2)), "other": of_size(text(1))}

    play(story)


def test_a_journal_that_dies_is_mended_though_one_export_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint behind which the journal goes on has of it what was flushed; also where writes found no room
    meanwhile.
    """

    async def story() -> None:
        platter = Platter(monkeypatch)
        async with with_an_ill_one(tmp_path) as service:
            disk(service, "other").write(0, text(1))
            platter.error = errno.EIO
            with pytest.raises(OSError, match="Input/output error"):
                await journal(service).synced()
            platter.error = 0
            assert journal(service).status.held_back == ()
            assert journal(service).fails(disk(service, "other"))
            died = journal(service)._last
            assert died is not None
            await of(service).take()
            assert journal(service).status.held_back == ("disk",)
            assert died.kept[disk(service, "other")].holders == 0, "it is not needed any more"
            platter.error = errno.EIO
            disk(service, "other").write(0, text(2))
            with pytest.raises(OSError, match="Input/output error"):
                await journal(service).synced()
            platter.error = 0
            await of(service)._give_way({disk(service).pool})
            died = journal(service)._last
            assert died is not None
            assert list(died.kept) == [disk(service)]
            await of(service).take()
            await journal(service).synced()
            assert journal(service).status.held_back == ("disk",)
            assert not journal(service).fails(disk(service, "other"))
            assert await behind_a_power_cut(tmp_path) == {"disk": of_size(noise(1)), "other": of_size(text(2))}
            await of(service).take()
            assert await behind_a_power_cut(tmp_path) == {"disk": of_size(noise(1)), "other": of_size(text(2))}

    play(story)


def test_a_journal_that_dies_is_mended_by_a_checkpoint_of_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was told that an export could not be added there may remove it again."""

    async def story() -> None:
        platter = Platter(monkeypatch)
        async with open_here(flushing, tmp_path) as service:
            await of(service).take()
            platter.error = errno.ENOSPC
            with pytest.raises(UserError, match="not on the disk of the checkpoints"):
                await asked(service, "exports.add", name="another", size_bytes=MIB)
            platter.error = 0
            await service.changes.remove_export("another", force=False)
            await of(service).take()
            await journal(service).synced()
            assert await behind_a_power_cut(tmp_path) == {"disk": bytes(4 * MIB), "other": bytes(4 * MIB)}

    play(story)


def test_a_checkpoint_beside_which_the_journal_dies_has_nothing_of_a_later_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups go on from what its moment has; with anything else they could not be applied."""

    async def story() -> None:
        platter = Platter(monkeypatch)
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            disk(service).write(0, noise(2))
            gate = Gate(monkeypatch)
            taking = asyncio.ensure_future(of(service).take())
            assert await asyncio.to_thread(gate.reached.wait, 60)
            copy = journal(service)._last
            assert copy is not None
            number = copy.kept[disk(service)].copy.number
            disk(service).write(0, noise(3))
            await journal(service).synced()
            spoil(tmp_path / "state" / "default.pool", lambda arena: arena.word_at(0, 0, number), 1 << 40)
            platter.error = errno.EIO
            disk(service, "other").write(0, text(1))
            with pytest.raises(OSError, match="Input/output error"):
                await journal(service).synced()
            platter.error = 0
            gate.opened.set()
            await taking
            assert (await behind_a_power_cut(tmp_path))["disk"] == of_size(noise(3))

    play(story)


def test_a_client_of_what_cannot_be_read_is_told_and_no_other(tmp_path: Path) -> None:
    """FLUSH and FUA are I/O errors on the one, and are answered on the other."""

    async def story() -> None:
        given = {"unix": (UnixAddress(path=tmp_path / "socket"),), "state_dir": tmp_path / "state"}
        service = Service(flushing_config(tmp_path / "kept", exports=EXPORTS, **given))
        await service.start()
        try:
            clients = [await (await WireClient.connect(str(tmp_path / "socket"))).go(name) for name in NAMES]
            for client in clients:
                await client.write(0, noise(1))
                assert (await client.call(FLUSH, 0, 0)).error == 0
            spoil_disk(tmp_path, service, *ROOT)
            await clients[1].write(0, text(1))
            assert [(await client.call(FLUSH, 0, 0)).error for client in clients] == [Error.EIO, 0]
            for client in clients:
                await client.close()
        finally:
            await service.stop()

    play(story)


ACTS: dict[str, dict[str, Any]] = {
    "exports.resize": {"name": "disk", "size_bytes": 8 * MIB},
    "exports.copy": {"source": "disk", "name": "clone"},
    "moments.take": {"name": "now"},
}


@pytest.mark.parametrize("act", ACTS)
def test_whoever_changes_what_cannot_be_read_is_told_that_the_power_undoes_it(tmp_path: Path, act: str) -> None:
    """It is made, and the disk keeps what was flushed before."""

    async def story() -> None:
        async with with_an_ill_one(tmp_path) as service:
            with pytest.raises(
                UserError, match=r"not on the disk of the checkpoints: '(disk|clone|disk@now)' cannot be"
            ):
                await asked(service, act, **ACTS[act])
            assert (await behind_a_power_cut(tmp_path))["disk"] == of_size(noise(1))
            await asked(service, "exports.change", name="disk", description="which the journal has")
            await asked(service, "exports.resize", name="other", size_bytes=8 * MIB)
            assert (await behind_a_power_cut(tmp_path))["other"] == bytes(8 * MIB)

    play(story)


def test_a_clone_of_what_cannot_be_read_is_not_there_and_in_nobodys_way(tmp_path: Path) -> None:
    """Nothing of it was ever flushed."""

    async def story() -> None:
        async with with_an_ill_one(tmp_path) as service:
            await service.changes.copy_export("disk", "clone", read_only=False)
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            assert journal(service).status.held_back == ("clone", "disk")
            assert journal(service).fails(disk(service, "clone"))
            assert await behind_a_power_cut(tmp_path) == {"disk": of_size(noise(1)), "other": of_size(text(1))}

    play(story)


def test_a_checkpoint_without_a_journal_holds_an_unreadable_export_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with with_an_ill_one(tmp_path, checkpointing) as service:
            disk(service, "other").write(0, text(1))
            await of(service).take()
            await of(service)._give_way({disk(service).pool})  # all copies but the one that is the only good one
            disk(service, "other").write(BLOCK, text(2))
            await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert (told.failures, told.held_back) == (0, ("disk",))
            left = await behind_a_power_cut(tmp_path, checkpointing)
            assert left == {"disk": of_size(noise(1)), "other": of_size(text(1) + text(2))}
            spoil_disk(tmp_path, service, *ROOT)  # the bit flips back
            await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert told.held_back == ()

    play(story)


@pytest.mark.parametrize("opened", [flushing, checkpointing])
def test_a_rollback_to_what_cannot_be_read_takes_nothing_from_the_disk(
    tmp_path: Path, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export has another disk then, of which nobody knows anything but that it is its. Rot came behind the look."""
    monkeypatch.setattr(rollback, "require_readable", lambda _: None)
    monkeypatch.setattr(rollback, "require_sound", lambda *_: None)

    async def story() -> None:
        async with open_here(opened, tmp_path) as service:
            disk(service).write(0, noise(1))
            await service.changes.take_moment("then")
            disk(service).write(0, noise(2))
            await keep(service)
            spoil_disk(tmp_path, service, *ROOT, name="disk@then")
            undone = UserError if opened is flushing else None
            with pytest.raises(undone, match="'disk' cannot be read") if undone else contextlib.nullcontext():
                await asked(service, "exports.rollback", name="disk", snapshot="disk@then")
            await service.changes.rename_export("disk", "second")
            for number in range(2):
                disk(service, "other").write(number * BLOCK, text(number))
                await keep(service)
            await of(service).take()
            left = await behind_a_power_cut(tmp_path, opened)
            assert (left["second"], left["other"]) == (of_size(noise(2)), of_size(text(0) + text(1)))
            await asked(service, "exports.rollback", name="second", snapshot="other@then")
            await keep(service)
            assert (await behind_a_power_cut(tmp_path, opened))["second"] == bytes(4 * MIB)

    play(story)


def test_a_clone_of_what_cannot_be_read_is_in_nobodys_way_behind_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment from which the journal is to go on is what the start read; the clone was none of it."""

    async def story() -> None:
        async with flushing(tmp_path / "kept", exports=EXPORTS) as service:
            disk(service).write(0, noise(1))
        platter, write_all = Platter(monkeypatch), checkpoints_module._write_all

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints_module, "_write_all", full)
        platter.error = errno.EIO
        given: dict[str, Any] = {"exports": EXPORTS, "state_dir": tmp_path / "state", "begun": False}
        async with flushing(tmp_path / "kept", **given) as service:
            with pytest.raises(OSError, match="the journal in"):
                await journal(service).synced()
            platter.error = 0
            async with of(service)._turn:  # no checkpoint is under way, which would have what is spoilt now as it was
                disk(service).write(0, noise(2))
                spoil_disk(tmp_path, service, *ROOT)
            await service.changes.copy_export("disk", "clone", read_only=False)
            disk(service, "other").write(0, text(1))
            monkeypatch.setattr(checkpoints_module, "_write_all", write_all)
            await of(service).take()
            await journal(service).synced()
            assert journal(service).status.held_back == ("clone", "disk")
            assert await behind_a_power_cut(tmp_path) == {"disk": of_size(noise(1)), "other": of_size(text(1))}

    play(story)
