"""Behind a journal an administrator's act is answered as done when the disk has it."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig
from nbdzram.errors import UserError
from nbdzram.server import place, settling
from nbdzram.server.journal import Journal
from nbdzram.server.place import Place
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME, Remembered, note_in, remembered_in
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    ADDED,
    CHANGED,
    MIB,
    NEVER,
    Platter,
    as_the_power_left_it,
    asked,
    disk,
    flushing,
    journal,
    of,
    play,
    whole,
)

ACTS: dict[str, dict[str, Any]] = {
    "exports.add": {"name": "fresh", "size_bytes": MIB},
    "exports.change": {
        "name": "other",
        "read_only": True,
        "allow_addresses": ["10.0.0.0/8"],
        "iops": 7,
        "quota_bytes": MIB,
    },
    "exports.rename": {"name": "other", "new_name": "second"},
    "exports.resize": {"name": "other", "size_bytes": 2 * MIB},
    "exports.reset": {"name": "other"},
    "exports.rollback": {"name": "other", "snapshot": "other@then"},
    "exports.copy": {"source": "other", "name": "copy"},
    "exports.remove": {"name": "other"},
    "moments.take": {"name": "now"},
}


@pytest.mark.parametrize("act", ACTS)
def test_what_an_administrator_was_told_is_done_is_there_after_the_power_failed(tmp_path: Path, act: str) -> None:
    """Nobody flushed behind it."""

    def told(service: Service) -> dict[str, Any]:
        return {
            export.name: (export.read_only, export.access, export.bounds, whole(export.disk))
            for export in service._exports
        }

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await service.changes.add_export("other", MIB, **ADDED)
            disk(service, "other").write(0, text(1))
            await service.changes.copy_export("other", "other@then", read_only=True)
            disk(service, "other").write(0, text(2))
            await journal(service).synced()
            before = told(service)
            await asked(service, act, **ACTS[act])
            after = told(service)
            assert after != before
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left, begun=False) as service:
            assert told(service) == after

    play(story)


@pytest.mark.parametrize("declared_anew", [False, True])
def test_what_was_changed_of_a_declared_export_holds_until_it_is_declared_otherwise(
    tmp_path: Path, declared_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a state directory: for each of its values."""
    declared = ExportConfig(name="disk", size_bytes=4 * MIB, iops=9 if declared_anew else 0)

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await asked(service, "exports.change", name="disk", **CHANGED)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        for _ in range(2):  # and behind the next failure
            async with flushing(left, exports=(declared,)) as service:
                export = service._exports.get("disk")
                assert whole(export.disk)[:BLOCK] == text(1)
                assert (export.read_only, export.access.addresses) == (True, ("10.0.0.0/8",))
                assert export.description == "of the operator"
                assert export.bounds.iops == (9 if declared_anew else 7)
                left = as_the_power_left_it(left, tmp_path / f"left again {os.urandom(2).hex()}")

    play(story)
    assert ("holds as declared, and not as it was: what it may take" in caplog.text) == declared_anew


def test_a_declared_export_that_was_removed_and_a_pool_that_was_added_are_so_after_the_power_failed(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await asked(service, "exports.remove", name="disk")
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            await asked(service, "pools.change", name="fast", mem_limit=32 * MIB)
            disk(service, "new").write(0, text(1))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with flushing(left) as service:
            assert [export.name for export in service._exports] == ["new"]
            assert whole(disk(service, "new"))[:BLOCK] == text(1)
            assert service._pools["fast"].pool.mem_limit == 32 * MIB
            await asked(service, "exports.add", name="disk", size_bytes=4 * MIB)
            left = as_the_power_left_it(left, tmp_path / "left again")
        async with flushing(left) as service:
            assert sorted(export.name for export in service._exports) == ["disk", "new"]

    play(story)


def test_a_start_knows_a_pool_before_anything_lies_there_and_more_room_before_it_is_filled(tmp_path: Path) -> None:
    """Whoever flushes has it on the disk before whoever asked for the pool has an answer."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await service.changes.add_pool("fast", MIB, "fold")
            await service.changes.add_export("new", 4 * MIB, **{**ADDED, "pool": "fast"})
            await service.changes.change_pool("fast", 64 * MIB, None)
            disk(service, "new").write(0, b"".join(map(noise, range(512))))
            await journal(service).synced()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            expected = whole(disk(service, "new"))
        async with flushing(left, begun=False) as service:
            assert whole(disk(service, "new")) == expected
            assert service._pools["fast"].pool.mem_limit == 64 * MIB

    play(story)


def test_less_room_in_a_pool_is_noted_behind_the_journal(tmp_path: Path) -> None:
    """That may have more of it until then; what is noted of another pool says nothing of this one."""

    async def story() -> None:
        async with flushing(tmp_path) as service:
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "pools.change", name="fast", mem_limit=96 * MIB)
            await service.changes.change_pool("fast", MIB, None)
            await service.changes.add_pool("other", MIB, "fold")
            known = remembered_in(tmp_path).pools
            assert {name: change.mem_limit for name, change in known.items()} == {"fast": 96 * MIB, "other": MIB}
            await asked(service, "pools.remove", name="other")
            known = remembered_in(tmp_path).pools
            assert {name: change.mem_limit for name, change in known.items()} == {"fast": MIB}

    play(story)


def test_a_pool_that_cannot_be_noted_is_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def story() -> None:
        async with flushing(tmp_path) as service:
            with monkeypatch.context() as patch:
                patch.setattr(place, "note_in", full)
                with pytest.raises(UserError, match="a start would not know of it: No space left on device"):
                    await service.changes.add_pool("fast", MIB, "fold")
            assert "fast" not in service._pools
            await asked(service, "pools.add", name="other", mem_limit=MIB)
            assert remembered_in(tmp_path).pools.keys() == {"other"}

    play(story)


@pytest.mark.parametrize("what", ["the directory", "the note"])
def test_what_was_noted_follows_checkpoints_to_another_directory(tmp_path: Path, what: str) -> None:
    """A start would refuse the exports of a pool that it does not know, and make those anew that were removed."""

    async def story() -> None:
        kept = tmp_path / "kept"
        async with flushing(kept) as service:
            await asked(service, "exports.remove", name="disk")
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            kept.rename(tmp_path / "elsewhere") if what == "the directory" else (kept / FILE_NAME).unlink()
            disk(service, "new").write(0, text(1))
            await of(service).take()
            left = as_the_power_left_it(kept, tmp_path / "left")
        async with flushing(left) as service:
            assert [(export.name, whole(export.disk)[:BLOCK]) for export in service._exports] == [("new", text(1))]

    play(story)


def test_pools_are_known_in_another_directory_before_a_checkpoint_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure at the moment at which it does leaves a checkpoint that a start can place."""
    stands = Journal.stands

    async def cut(log: Journal, *given: Any) -> None:
        as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        await stands(log, *given)

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            await asked(service, "pools.add", name="fast")
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            disk(service, "new").write(0, text(1))
            (tmp_path / "kept").rename(tmp_path / "elsewhere")
            monkeypatch.setattr(Journal, "stands", cut)
            await of(service).take()
            monkeypatch.undo()
        async with flushing(tmp_path / "left", begun=False) as service:
            assert whole(disk(service, "new"))[:BLOCK] == text(1)

    play(story)


def test_what_was_noted_stays_where_it_is(tmp_path: Path) -> None:
    """Checkpoints write what is there already no second time."""

    async def story() -> None:
        async with flushing(tmp_path) as service:
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            before = (tmp_path / FILE_NAME).stat()
            for number in range(2):
                disk(service).write(0, text(number))
                await of(service).take()
            assert (tmp_path / FILE_NAME).stat() == before

    play(story)


def test_an_act_that_is_noted_and_not_in_the_journal_was_not_made(tmp_path: Path) -> None:
    """It is remembered before it is made, so the note behind another's act may know of it."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        noted = remembered_in(left)
        removal = replace(noted.exports["other"], size_bytes=4 * MIB, removed=True)
        change = replace(noted.exports["other"], description="not yet")
        note_in(left, replace(noted, exports={"other": change, "disk": removal}))
        async with flushing(left, begun=False) as service:
            assert disk(service).read(0, BLOCK) == text(1)
            assert service._exports.get("other").description == ""

    play(story)


def test_what_is_noted_beside_the_journal_is_never_ahead_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that the journal does not tell yet was not made, as far as a start knows."""

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            platter = Platter(monkeypatch)
            platter.opened.clear()
            removal = asyncio.ensure_future(asked(service, "exports.remove", name="disk"))
            assert await asyncio.to_thread(platter.reached.wait, 60)
            assert not removal.done()
            assert remembered_in(tmp_path / "kept").exports["disk"].removed is False
            platter.opened.set()
            await removal
            assert remembered_in(tmp_path / "kept").exports["disk"].removed

    play(story)


def test_an_act_that_does_not_reach_the_disk_is_not_answered_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made; whoever asked is told that the power may undo it, at once or when it takes too long."""

    async def story() -> None:
        async with flushing(tmp_path) as service:
            platter = Platter(monkeypatch)
            platter.opened.clear()
            monkeypatch.setattr(settling, "SETTLE_SECONDS", 0)
            with pytest.raises(UserError, match=r"it is done, and not on the disk .* took longer than 0 s"):
                await asked(service, "exports.add", name="other", size_bytes=MIB)
            platter.error = errno.EIO
            platter.opened.set()
            monkeypatch.setattr(settling, "SETTLE_SECONDS", NEVER)
            async with of(service)._turn:  # no checkpoint is taken meanwhile
                with pytest.raises(UserError, match=r"it is done, and not on the disk .* failed .Input/output error"):
                    await asked(service, "exports.change", name="other", read_only=True)
            assert service._exports.get("other").read_only
            platter.error = 0

    play(story)


def test_what_the_disk_says_is_told_also_where_it_says_that_it_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of a network gives up by itself; nobody waited for as long as an administrator may."""

    def timed_out(*_: object) -> None:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    async def story() -> None:
        async with flushing(tmp_path) as service:
            with monkeypatch.context() as patch:
                patch.setattr(place, "note_in", timed_out)
                with pytest.raises(UserError, match="on the disk of the checkpoints: Connection timed out; if"):
                    await asked(service, "exports.add", name="other", size_bytes=MIB)

    play(story)


async def ask_and_go_away(service: Service, reached: threading.Event) -> None:
    """Whoever asks for a change waits no longer once its note is `reached`."""
    asking = asyncio.ensure_future(asked(service, "exports.change", name="disk", read_only=True))
    assert await asyncio.to_thread(reached.wait, 60)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


def test_a_server_that_hands_over_waits_for_a_note_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for it waits no longer; behind the end the directory is another server's."""
    reached, opened = threading.Event(), threading.Event()
    order: list[str] = []
    let_go = Place.release

    def slow(directory: Path, changes: Remembered) -> None:
        reached.set()
        assert opened.wait(60)
        note_in(directory, changes)
        order.append("noted")

    def release(place: Place) -> None:
        order.append("let go")
        let_go(place)

    async def open_late() -> None:
        for _ in range(1000):  # the end comes as far as it can while the note stands
            if order:
                break
            await asyncio.to_thread(int)
        opened.set()

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            monkeypatch.setattr(place, "note_in", slow)
            await ask_and_go_away(service, reached)
            monkeypatch.setattr(Place, "release", release)
            late = asyncio.ensure_future(open_late())
            await of(service).stop(last=False)  # as in a takeover; a last one would wait for its own note
            await late
            of(service)._task = None  # it has ended

    play(story)
    assert order == ["noted", "let go"]


def test_a_note_that_was_slow_does_not_replace_a_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked for it waits no longer; what another administrator was told meanwhile holds."""
    reached, opened, noted = threading.Event(), threading.Event(), threading.Semaphore(0)

    def slow_once(directory: Path, changes: Remembered) -> None:
        if not reached.is_set():
            reached.set()
            assert opened.wait(60)
        note_in(directory, changes)
        noted.release()

    async def story() -> None:
        async with flushing(tmp_path / "kept") as service:
            disk(service).write(0, text(1))
            await journal(service).synced()
            monkeypatch.setattr(place, "note_in", slow_once)
            await ask_and_go_away(service, reached)
            second = asyncio.ensure_future(asked(service, "exports.remove", name="disk"))
            while len(service._exports):  # noqa: ASYNC110 - the removal tells nobody
                await asyncio.sleep(0)
            for _ in range(100):  # the second comes as far as it can while the first stands
                await journal(service).synced()
                await asyncio.to_thread(int)
            opened.set()
            await second
            for _ in range(2):
                assert await asyncio.to_thread(noted.acquire, timeout=60)
            assert remembered_in(tmp_path / "kept").exports["disk"].removed

    play(story)
