"""What was said of exports and pools lies beside checkpoints without a journal, too."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from nbdzram.config import ExportConfig, PoolConfig
from nbdzram.errors import UserError
from nbdzram.server import place
from nbdzram.server.state import FILE_NAME, remembered_in
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.lasting import (
    CHANGED,
    MIB,
    Gate,
    as_the_power_left_it,
    asked,
    checkpointing,
    disk,
    of,
    play,
    whole,
)


@pytest.mark.parametrize("declared_anew", [False, True])
def test_what_was_said_of_exports_behind_the_last_checkpoint_holds_where_no_journal_tells(
    tmp_path: Path, declared_anew: bool
) -> None:
    """Whom an administrator kept out stays out; what clients wrote behind it is lost with the power."""
    declared = ExportConfig(name="disk", size_bytes=4 * MIB, iops=9 if declared_anew else 0)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await asked(service, "exports.add", name="other", size_bytes=MIB)
            disk(service).write(0, text(1))
            await of(service).take()
            disk(service).write(0, text(2))
            for name in ("disk", "other"):
                await asked(service, "exports.change", name=name, **CHANGED)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        for _ in range(2):  # and behind the next failure
            async with checkpointing(left, exports=(declared,)) as service:
                assert whole(disk(service))[:BLOCK] == text(1)
                for name in ("disk", "other"):
                    export = service._exports.get(name)
                    assert (export.read_only, export.access.addresses) == (True, ("10.0.0.0/8",))
                    assert export.description == "of the operator"
                    assert export.bounds.iops == (9 if declared_anew and name == "disk" else 7)
                left = as_the_power_left_it(left, tmp_path / f"left again {os.urandom(2).hex()}")

    play(story)


def test_what_was_said_of_another_disk_does_not_open_one_that_comes_back(tmp_path: Path) -> None:
    """It lay in another pool."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            closed = ["10.0.0.0/8"]
            await asked(service, "exports.add", name="other", size_bytes=MIB, allow_addresses=closed)
            await of(service).take()
            await asked(service, "exports.remove", name="other")
            await asked(service, "pools.add", name="second")
            await asked(service, "exports.add", name="other", size_bytes=MIB, pool="second", allow_addresses=[])
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert service._exports.get("other").access.addresses == tuple(closed)

    play(story)


def test_a_pool_that_was_added_is_there_for_what_a_checkpoint_has_of_it_and_what_was_removed_is_not(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await asked(service, "exports.remove", name="disk")
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            disk(service, "new").write(0, text(1))
            await of(service).take()
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert [export.name for export in service._exports] == ["new"]
            assert whole(disk(service, "new"))[:BLOCK] == text(1)

    play(story)


def test_what_cannot_be_noted_though_a_checkpoint_stands_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Less room in a pool, which has to wait for that; nobody does who could be told."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def story() -> None:
        async with checkpointing(tmp_path) as service:
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await of(service).take()
            await service.changes.change_pool("fast", 32 * MIB, None)
            with monkeypatch.context() as patch:
                patch.setattr(place, "note_in", full)
                await of(service).take()

    play(story)
    assert "what was changed last: it is done, and not on the disk of the checkpoints: No space left" in caplog.text


def test_nothing_is_noted_in_a_directory_that_another_server_has(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await of(service).take()
            before = remembered_in(tmp_path / "kept")
            of(service).place.release()
            with pytest.raises(UserError, match=r"it is done, .*: another server has their directory; .* undone$"):
                await asked(service, "exports.change", name="disk", **CHANGED)
            assert service._exports.get("disk").read_only
            assert remembered_in(tmp_path / "kept") == before

    play(story)


def test_a_note_that_cannot_be_read_keeps_nobody_from_what_the_arenas_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            disk(service).write(0, text(1))
            await of(service).take()
        (tmp_path / "kept" / FILE_NAME).write_text("{")
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            assert whole(disk(service))[:BLOCK] == text(1)
        (tmp_path / "kept" / FILE_NAME).write_text("{")  # another one was written as that ended
        with pytest.raises(UserError, match=r"changes\.json is damaged"):
            async with checkpointing(tmp_path / "kept"):
                raise AssertionError

    (tmp_path / "kept").mkdir()
    play(story)
    assert "is damaged" in caplog.text
    assert "what the arenas hold is served" in caplog.text


def test_a_state_directory_that_has_the_checkpoints_too_remembers_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path, state_dir=tmp_path) as service:
            assert of(service).settling is None
            await asked(service, "exports.change", name="disk", **CHANGED)
            assert remembered_in(tmp_path).exports["disk"].read_only

    play(story)


@pytest.mark.parametrize("pool", ["default", "fast"])
def test_less_room_in_a_pool_is_noted_when_a_checkpoint_stands_without_what_lay_there(
    tmp_path: Path, pool: str
) -> None:
    """A start has to have room for what the one before it has."""
    declared = (PoolConfig(mem_limit=64 * MIB),)
    content = b"".join(map(noise, range(1024)))

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", pools=declared) as service:
            if pool == "fast":
                await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=len(content), pool=pool)
            disk(service, "new").write(0, content)
            await of(service).take()
            disk(service, "new").trim(0, len(content))
            await asked(service, "pools.change", name=pool, mem_limit=MIB)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            await of(service).take()
            later = as_the_power_left_it(tmp_path / "kept", tmp_path / "later")
        async with checkpointing(left, pools=declared) as service:
            assert whole(disk(service, "new")) == content
        async with checkpointing(later, pools=declared) as service:
            assert not any(whole(disk(service, "new")))
            assert service._pools[pool].pool.mem_limit == MIB

    play(story)


@pytest.mark.parametrize("pool", ["default", "fast"])
def test_what_was_said_of_a_pool_holds_though_it_has_less_room_since(tmp_path: Path, pool: str) -> None:
    """Only the room waits for a checkpoint; that clients find nothing out about others does not."""
    declared = (PoolConfig(mem_limit=64 * MIB, tell_sharing=True),)

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", pools=declared) as service:
            if pool == "fast":
                await asked(service, "pools.add", name="fast", mem_limit=64 * MIB, tell_sharing=True)
            await of(service).take()
            await asked(service, "pools.change", name=pool, mem_limit=MIB, tell_sharing=False)
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left, pools=declared) as service:
            began = service._pools[pool].pool
            assert (began.tells_sharing, began.mem_limit) == (False, 64 * MIB)

    play(story)


def test_a_pool_of_a_checkpoint_that_took_long_is_known_until_another_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else was changed while it was written, so that the note behind it was none of its moment."""

    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            gate = Gate(monkeypatch)
            taking = asyncio.create_task(of(service).take())
            await asyncio.to_thread(gate.reached.wait, 60)
            await asked(service, "exports.change", name="disk", **CHANGED)
            gate.opened.set()
            await taking
            await asked(service, "exports.remove", name="new")
            await asked(service, "pools.remove", name="fast")
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
        async with checkpointing(left) as service:
            assert "new" in service._exports

    play(story)


def test_who_serves_what_another_process_served_notes_no_less_room_than_its_checkpoint_needs(tmp_path: Path) -> None:
    content = b"".join(map(noise, range(1024)))

    async def story() -> None:
        async with checkpointing(tmp_path / "kept", state_dir=tmp_path / "state") as service:
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=len(content), pool="fast")
            disk(service, "new").write(0, content)
            await of(service).take()
            disk(service, "new").trim(0, len(content))
            await asked(service, "pools.change", name="fast", mem_limit=MIB)
            killed = [as_the_power_left_it(tmp_path / one, tmp_path / f"{one} later") for one in ("kept", "state")]
        async with checkpointing(killed[0], state_dir=killed[1]) as service:
            assert not any(whole(disk(service, "new")))
            await asked(service, "exports.change", name="new", **CHANGED)
            left = as_the_power_left_it(killed[0], tmp_path / "left")
        async with checkpointing(left) as service:
            assert whole(disk(service, "new")) == content
            assert service._pools["fast"].pool.mem_limit == 64 * MIB

    play(story)


def test_a_pool_that_was_removed_is_known_until_a_checkpoint_stands_without_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with checkpointing(tmp_path / "kept") as service:
            await asked(service, "pools.add", name="fast", mem_limit=64 * MIB)
            await asked(service, "exports.add", name="new", size_bytes=MIB, pool="fast")
            await of(service).take()
            await asked(service, "exports.remove", name="new")
            await asked(service, "pools.remove", name="fast")
            left = as_the_power_left_it(tmp_path / "kept", tmp_path / "left")
            await of(service).take()
            later = as_the_power_left_it(tmp_path / "kept", tmp_path / "later")
        async with checkpointing(left) as service:
            assert "new" in service._exports
        async with checkpointing(later) as service:
            assert list(service._pools) == ["default"]

    play(story)
