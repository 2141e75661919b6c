"""A bit that flips in what one export is costs no other export its flush, nor anybody what was flushed before."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig, UnixAddress
from nbdzram.machine import Machine
from nbdzram.nbd.constants import Error
from nbdzram.server import checkpoints as checkpoints_module
from nbdzram.server.service import Service
from nbdzram.stream.journal import Segment
from tests.support.arena import CURRENT_AT, HEAD_SIZE, HEADS_AT, NAME_AT, Arena
from tests.support.loop_client import WireClient
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    AS_IT_IS,
    MIB,
    as_the_power_left_it,
    checkpointing,
    disk,
    files,
    flushing,
    flushing_config,
    journal,
    of,
    play,
    spoil,
    whole,
)

NAMES = (b"disk", b"other")
FLUSH = 3
EXPORTS = (ExportConfig(name="disk", size_bytes=4 * MIB), ExportConfig(name="other", size_bytes=4 * MIB))


@pytest.fixture(autouse=True)
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "keeps_in_memory", lambda *_: True)
    (tmp_path / "state").mkdir()


def open_here(opened: Callable[..., Any], tmp_path: Path) -> Any:
    return opened(tmp_path / "kept", exports=EXPORTS, state_dir=tmp_path / "state")


def spoil_disk(tmp_path: Path, service: Service, place_of: Callable[[Arena, int], int], bits: int) -> None:
    number = disk(service).number
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
async def begun_again(left: Path, opened: Callable[..., Any] = flushing) -> AsyncIterator[Service]:
    given: dict[str, Any] = {"begun": False} if opened is flushing else {}
    async with opened(left, exports=EXPORTS, **given) as service:
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
            held = {name: whole(disk(service, name)) for name in ("disk", "other")}
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert files(left)[-1] != "00000001-full.stream"
        async with begun_again(left, opened) as service:
            assert {export.name: whole(export.disk) for export in service._exports} == held

    play(story)
    assert caplog.text.count("the entry of the export 'disk' in the export directory is not what was written") == 1


def test_one_export_that_cannot_be_read_fails_its_own_flush_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal and the checkpoints go on with it as it was; the others are as they are."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            disk(service).write(0, noise(2))
            spoil_disk(tmp_path, service, *ROOT)
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
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            assert "full" in files(left)[0]
            await service.changes.remove_export("disk", force=True)
            await journal(service).synced()
            assert journal(service).status.held_back == ()
            assert await journal(service).reached() is not None
        async with begun_again(left) as service:
            assert whole(disk(service)) == noise(1) + bytes(4 * MIB - BLOCK), "as it was when it was flushed last"
            assert disk(service, "other").read(0, 3 * BLOCK) == text(0) + text(1) + text(2)

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
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            disk(service).write(0, noise(2))
            spoil_disk(tmp_path, service, *ROOT)
            await journal(service).synced()
            assert await journal(service).reached() is None
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with begun_again(left) as service:
            assert disk(service).read(0, BLOCK) == noise(1)

    play(story)


@pytest.mark.parametrize("size_bytes", [2 * MIB, 8 * MIB])
def test_what_was_resized_and_cannot_be_read_has_the_size_of_its_copy(tmp_path: Path, size_bytes: int) -> None:
    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            disk(service).write(3 * MIB, noise(3))
            await journal(service).synced()
            disk(service).resize(size_bytes)
            spoil_disk(tmp_path, service, *ROOT)
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            assert journal(service).status.held_back == ("disk",)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with begun_again(left) as service:
            assert whole(disk(service)) == noise(1) + bytes(3 * MIB - BLOCK) + noise(3) + bytes(MIB - BLOCK)
            assert disk(service, "other").read(0, BLOCK) == text(1)

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
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with begun_again(left) as service:
            assert disk(service).read(0, BLOCK) == noise(2)
            assert disk(service, "other").read(0, BLOCK) == text(1)

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


def test_a_clone_of_what_cannot_be_read_is_not_there_and_in_nobodys_way(tmp_path: Path) -> None:
    """Nothing of it was ever flushed."""

    async def story() -> None:
        async with open_here(flushing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await journal(service).synced()
            disk(service).write(0, noise(2))
            spoil_disk(tmp_path, service, *ROOT)
            await service.changes.copy_export("disk", "clone", read_only=False)
            disk(service, "other").write(0, text(1))
            await journal(service).synced()
            assert journal(service).status.held_back == ("clone", "disk")
            assert journal(service).fails(disk(service, "clone"))
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with begun_again(left) as service:
            assert {export.name for export in service._exports} == {"disk", "other"}
            assert disk(service).read(0, BLOCK) == noise(1)
            assert disk(service, "other").read(0, BLOCK) == text(1)

    play(story)


def test_a_checkpoint_without_a_journal_holds_an_unreadable_export_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with open_here(checkpointing, tmp_path) as service:
            disk(service).write(0, noise(1))
            await of(service).take()
            disk(service).write(0, noise(2))
            disk(service, "other").write(0, text(1))
            spoil_disk(tmp_path, service, *ROOT)
            await of(service).take()
            await of(service)._give_way({disk(service).pool})  # all copies but the one that is the only good one
            disk(service, "other").write(BLOCK, text(2))
            await of(service).take()
            told = service.status().checkpoint
            assert told is not None
            assert told.failures == 0
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with begun_again(left, checkpointing) as service:
            assert disk(service).read(0, BLOCK) == noise(1)
            assert disk(service, "other").read(0, BLOCK) == text(1)

    play(story)
