"""What an administrator said last of who may attach holds wherever a server's disks come from: nobody opens them by it.

A checkpoint without a journal is older than what was said, and may bring back what was removed since.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from nbdzram.config import ExportConfig
from nbdzram.errors import UserError
from nbdzram.server import checkpoints, place, segments, settling
from nbdzram.server.service import Service
from tests.unit.engine.blocks import BLOCK, text
from tests.unit.server.lasting import (
    CHANGED,
    MIB,
    as_the_power_left_it,
    asked,
    checkpointing,
    disk,
    files,
    flushing,
    journal,
    of,
    play,
    whole,
)

CLOSED = ("10.0.0.0/8",)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied each time."""
    monkeypatch.setattr(segments, "ROOM_BYTES", 64 << 10)


def rules(service: Service, name: str) -> tuple[bool, tuple[str, ...]]:
    export = service._exports.get(name)
    return export.read_only, export.access.addresses


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def with_others(service: Service, *names: str) -> None:
    """Exports that nobody declares, in a checkpoint that has them open."""
    for number, name in enumerate(names):
        await asked(service, "exports.add", name=name, size_bytes=MIB)
        disk(service, name).write(0, text(number))
    await of(service).take()


@pytest.mark.parametrize("then", ["removed", "renamed", "made anew"])
@pytest.mark.parametrize("name", ["disk", "other"])
def test_what_was_closed_and_then_went_comes_back_no_more_open(tmp_path: Path, name: str, then: str) -> None:
    """With the checkpoint from before; what it held is nobody's whom a later disk of its name admits."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await with_others(service, "other")
            disk(service).write(0, text(0))
            await of(service).take()
            await asked(service, "exports.change", name=name, **CHANGED)
            if then == "renamed":
                await asked(service, "exports.rename", name=name, new_name="elsewhere")
            else:
                await asked(service, "exports.remove", name=name)
            if then == "made anew":
                await asked(service, "exports.add", name=name, size_bytes=MIB, allow_addresses=[], read_only=False)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service, name))[:BLOCK] == text(0)
            assert rules(service, name) == (True, CLOSED)

    play(story)


def test_what_went_is_noted_until_a_checkpoint_stands_without_it(tmp_path: Path) -> None:
    """Then a disk of its name has its own rules alone."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await with_others(service, "other")
            await asked(service, "exports.change", name="other", **CHANGED)
            await asked(service, "exports.remove", name="other")
            given: dict[str, Any] = {"allow_addresses": [], "read_only": False}
            await asked(service, "exports.add", name="other", size_bytes=MIB, **given)
            disk(service, "other").write(0, text(7))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(7)
            assert rules(service, "other") == (False, ())

    play(story)


def test_a_checkpoint_that_has_a_later_disk_of_a_name_is_told_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power fails as it stands, and before that is noted: what went was open, and what it has is not."""
    follow = settling.Settling.follow

    async def cut(*given: Any) -> None:
        as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        monkeypatch.undo()
        await follow(*given)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await with_others(service, "other")
            await asked(service, "exports.remove", name="other")
            await asked(service, "exports.add", name="other", size_bytes=MIB, allow_addresses=list(CLOSED))
            disk(service, "other").write(0, text(7))
            monkeypatch.setattr(settling.Settling, "follow", cut)
            await of(service).take()
        async with checkpointing(tmp_path / "left") as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(7)
            assert rules(service, "other") == (False, CLOSED)

    play(story)


def test_what_was_said_before_the_first_checkpoint_holds_for_what_is_made_anew(tmp_path: Path) -> None:
    """Their content is gone with the power, and whom an administrator kept out stays out."""
    declared = tuple(ExportConfig(name=name, size_bytes=MIB) for name in ("disk", "gone"))

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", exports=declared) as service:
            await asked(service, "exports.change", name="disk", **CHANGED)
            await asked(service, "exports.remove", name="gone")
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert not files(left)
        async with checkpointing(left, exports=declared) as service:
            assert [export.name for export in service._exports] == ["disk"]
            assert rules(service, "disk") == (True, CLOSED)

    play(story)


def test_what_was_removed_before_the_first_checkpoint_does_not_come_back_by_what_was_noted_before(
    tmp_path: Path,
) -> None:
    """A server was killed between removing and noting: the state directory knows better than the note."""
    (tmp_path / "state").mkdir()
    declared = (ExportConfig(name="disk", size_bytes=MIB),)

    async def story() -> None:
        given: dict[str, Any] = {"state_dir": tmp_path / "state", "exports": declared}
        async with checkpointing(tmp_path / "kept", **given) as service:
            await asked(service, "exports.change", name="disk", **CHANGED)
            await service.changes.remove_export("disk", force=False)
            killed = [as_the_power_left_it(tmp_path / one, tmp_path / f"{one} later") for one in ("kept", "state")]
        assert not files(killed[0])
        async with checkpointing(killed[0], state_dir=killed[1], exports=declared) as service:
            assert not len(service._exports)

    play(story)


@pytest.mark.parametrize("declares", ["nothing", "a list", "a list, and lies elsewhere"])
def test_a_file_to_restore_opens_nothing_that_was_declared_or_said_beside_the_checkpoints(
    tmp_path: Path, declares: str
) -> None:
    """The flag stands in a unit, and the power failed before the first checkpoint stood."""
    lists = () if declares == "nothing" else CLOSED
    declared = ExportConfig(name="disk", size_bytes=4 * MIB, allow_addresses=lists)

    async def story() -> None:
        async with checkpointing(tmp_path / "first") as service:
            disk(service).write(0, text(1))
            await with_others(service, "other")
        backup = next((tmp_path / "first").glob("*-full.stream"))
        given: dict[str, Any] = {"restore_from": backup, "exports": (declared,)}
        async with checkpointing(tmp_path / "kept", **given) as service:
            assert rules(service, "disk") == (False, lists)
            name = "other" if lists else "disk"
            await asked(service, "exports.change", name=name, **CHANGED)
            await asked(service, "exports.change", name="other", **CHANGED)
            if "elsewhere" in declares:
                await asked(service, "exports.remove", name="disk")
                await asked(service, "pools.add", name="fast")
                await asked(service, "exports.add", name="disk", size_bytes=MIB, pool="fast")
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        assert not files(left)
        async with checkpointing(left, **given) as service:
            assert whole(disk(service))[:BLOCK] == text(1)
            assert rules(service, "disk") == (not lists, CLOSED)
            assert rules(service, "other") == (True, CLOSED)

    play(story)


def test_what_was_said_holds_where_a_journal_has_begun_and_has_nothing_yet(tmp_path: Path) -> None:
    """Of a server that flushes from now on, and lost its power again."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await with_others(service, "other")
            await asked(service, "exports.change", name="other", **CHANGED)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left, begun=False) as service:
            assert journal(service).status.usable
            again = as_the_power_left_it(left, tmp_path / "again")
        assert list(again.glob("*.journal"))
        async with flushing(again, begun=False) as service:
            assert rules(service, "other") == (True, CLOSED)

    play(story)


def test_nobody_is_answered_while_a_journal_of_before_would_come_before_what_he_said(tmp_path: Path) -> None:
    """Of a server that flushes no more: its first checkpoint lets the journal go, and comes at once."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert list(left.glob("*.journal"))
            await asked(service, "exports.change", name="other", **CHANGED)
            again = as_the_power_left_it(left, tmp_path / "again")
        async with checkpointing(again) as service:
            assert rules(service, "other") == (True, CLOSED)

    play(story)


@pytest.mark.parametrize("opened", [checkpointing, flushing])
def test_no_checkpoint_stands_behind_which_an_older_note_would_open_an_export(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closed it was told that a checkpoint would make that last."""

    async def story() -> None:
        async with opened(tmp_path / "kept") as service:
            await with_others(service, "other")
            with monkeypatch.context() as patch:
                patch.setattr(place, "note_in", full)
                with pytest.raises(UserError, match=r"it is done, and not on the disk .* before a checkpoint stands"):
                    await asked(service, "exports.change", name="other", **CHANGED)
                before = files(tmp_path / "kept")
                disk(service).write(0, text(5))
                await of(service).take()
                assert service.status().checkpoint.failures == 1
                assert [name for name in files(tmp_path / "kept") if name.endswith("stream")] == [
                    name for name in before if name.endswith("stream")
                ]
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with opened(left) as service:
            assert rules(service, "other") == (True, CLOSED)
            assert whole(disk(service))[:BLOCK] == text(5)

    play(story)


@pytest.mark.parametrize("act", ["removed", "renamed"])
def test_a_declared_export_that_went_in_the_journal_alone_is_not_made_anew_and_empty(tmp_path: Path, act: str) -> None:
    """The power failed before that was noted, and before whoever asked for it had an answer."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            if act == "removed":
                await service.changes.remove_export("disk", force=False)
            else:
                await service.changes.rename_export("disk", "elsewhere")
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left, begun=False) as service:
            assert "disk" not in service._exports
            assert act == "removed" or whole(disk(service, "elsewhere"))[:BLOCK] == text(1)

    play(story)


@pytest.mark.parametrize("anew", [False, True])
def test_what_went_is_noted_on_by_who_serves_what_another_process_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """Which was killed before a checkpoint stood without it; also where a later disk of its name went as well."""
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            await with_others(service, "other")
            await asked(service, "exports.change", name="other", **CHANGED)
            await asked(service, "exports.remove", name="other")
            if anew:
                await asked(service, "exports.add", name="other", size_bytes=MIB, allow_addresses=[], read_only=False)
            killed = [as_the_power_left_it(tmp_path / one, tmp_path / f"{one} later") for one in ("kept", "state")]
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_write_all", full)
            async with checkpointing(killed[0], state_dir=killed[1]) as service:
                if anew:
                    await service.changes.remove_export("other", force=False)
                await of(service).take()
                left = as_the_power_left_it(killed[0], tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service, "other"))[:BLOCK] == text(0)
            assert rules(service, "other") == (True, CLOSED)

    play(story)


def test_nobody_is_answered_while_a_checkpoint_has_a_disk_by_a_name_that_nobody_knows_any_more(tmp_path: Path) -> None:
    """It was renamed under another process, which was killed: what is said of it now is not said of what comes back."""
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            await with_others(service, "other")
            await asked(service, "exports.rename", name="other", new_name="elsewhere")
            killed = [as_the_power_left_it(tmp_path / one, tmp_path / f"{one} later") for one in ("kept", "state")]
        async with checkpointing(killed[0], state_dir=killed[1]) as service:
            await asked(service, "exports.change", name="elsewhere", **CHANGED)
            left = as_the_power_left_it(killed[0], tmp_path / "left")
        async with checkpointing(left) as service:
            held = [export.access.addresses for export in service._exports if whole(export.disk)[:BLOCK] == text(0)]
            assert held == [CLOSED]

    play(story)


@pytest.mark.parametrize("opened", [checkpointing, flushing])
def test_what_a_reload_closed_for_which_nobody_waited_stays_closed_when_it_is_declared_no_more(
    tmp_path: Path, opened: Any
) -> None:
    """The power failed before the next checkpoint."""
    closed = ExportConfig(name="disk", size_bytes=4 * MIB, allow_addresses=CLOSED)

    async def story() -> None:
        async with opened(tmp_path / "kept") as service:
            await of(service).take()
            reload = service._reload
            for exports in ((closed,), ()):
                reload._reread = partial(replace, service.config, exports=exports)
                service.hang_up()
                await cast("asyncio.Task[None]", reload._soon)
                await cast("asyncio.Task[None]", reload._settling)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with opened(left, exports=()) as service:
            assert rules(service, "disk") == (False, CLOSED)

    play(story)


@pytest.mark.parametrize("declared", [(), (ExportConfig(name="disk", size_bytes=MIB),)], ids=["nothing", "one"])
def test_what_was_removed_last_does_not_come_back_where_the_pools_outlived_the_server(
    tmp_path: Path, declared: tuple[ExportConfig, ...]
) -> None:
    """They hold no disk, and so looked as if the power had failed; and where a pool had gone, no server started. Be it
    declared, or not, or no more, and be the server killed again."""
    (tmp_path / "state").mkdir()

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state", exports=declared) as service:
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.add", name="other", size_bytes=MIB, pool="fast")
            await of(service).take()
            for name in ("other", *(one.name for one in declared)):
                await asked(service, "exports.remove", name=name)
            await asked(service, "pools.remove", name="fast")
            killed = [as_the_power_left_it(tmp_path / one, tmp_path / f"{one} later") for one in ("kept", "state")]
        for _ in range(2):
            async with checkpointing(killed[0], state_dir=killed[1], exports=()) as service:
                assert not len(service._exports)
                killed = [as_the_power_left_it(one, tmp_path / f"{one.name} again") for one in killed]
        again = (ExportConfig(name="disk", size_bytes=MIB),)
        async with checkpointing(killed[0], state_dir=killed[1], exports=again) as service:
            assert [export.name for export in service._exports] == ["disk"], "it is declared, and was not in between"
            assert whole(disk(service)) == bytes(MIB)

    play(story)


def test_what_was_lost_with_its_pool_comes_from_a_checkpoint_though_another_was_removed(tmp_path: Path) -> None:
    """Somebody removed the damaged file of a pool, and the state directory remembers its exports."""
    (tmp_path / "state").mkdir()
    declared = tuple(ExportConfig(name=name, size_bytes=MIB) for name in ("disk", "gone"))

    async def story() -> None:
        given: dict[str, Any] = {"state_dir": tmp_path / "state", "exports": declared}
        async with checkpointing(tmp_path / "kept", **given) as service:
            disk(service).write(0, text(1))
            await asked(service, "exports.remove", name="gone")
        (tmp_path / "state" / "default.pool").unlink()
        async with checkpointing(tmp_path / "kept", **given) as service:
            assert {export.name: whole(export.disk)[:BLOCK] for export in service._exports} == {"disk": text(1)}

    play(story)
