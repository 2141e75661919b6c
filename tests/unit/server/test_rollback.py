"""Going back to a snapshot, and snapshots by the clock: nothing is lost, and nobody reads a mixture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import ExportConfig
from nbdzram.engine import moment
from nbdzram.errors import EngineError, NoSuchExport, UserError
from nbdzram.nbd.constants import Command, Reply
from nbdzram.server import rollback as rollback_module
from nbdzram.server.rollback import SUBSTITUTE
from nbdzram.server.schedule import Schedule
from nbdzram.values import MAX_NAME_BYTES, STAMPED, name_of_snapshots
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.server.house import MIB, UNCHANGED, House, tell
from tests.unit.server.lasting import spoil

NOON = datetime(2026, 11, 27, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def names(house: House) -> list[str]:
    return [export.name for export in house.service.status().exports]


# -- going back ------------------------------------------------------------------------------------------------------


def test_a_disk_holds_what_the_snapshot_holds_and_keeps_all_else(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, b"old" * 512)
            await changes.copy_export("disk", "monday", read_only=True)
            await client.write(0, b"new" * 1024)
            await client.close()
            await changes.change_export("disk", **{**UNCHANGED, "description": "kept"})
            await changes.resize_export("disk", 16 * MIB, yes=False, force=False)
            answer = await changes.rollback_export("disk", "monday", force=False)
            assert (answer.size_bytes, answer.description, answer.read_only) == (8 * MIB, "kept", False)
            assert answer.operations["write"].requests == 2
            assert names(house) == ["disk", "monday"]
            for name in (b"disk", b"monday"):
                client = await house.client(name)
                assert await client.read(0, 3072) == (b"old" * 512).ljust(3072, b"\0")
                await client.close()
            client = await house.client()
            await client.write(0, b"yet" * 512)  # it is a disk of its own
            await client.close()
            client = await house.client(b"monday")
            assert await client.read(0, 3) == b"old"
            await client.close()
        async with house.open():
            assert names(house) == ["disk", "monday"]
            assert (house.found().description, house.found().size_bytes) == ("kept", 8 * MIB)
            client = await house.client()
            assert await client.read(0, 3) == b"yet"
            await client.close()
            house.pool().check()

    tell(story())


@pytest.mark.parametrize("level", [0, 1, 2, 3], ids=["a block", "a leaf", "a branch", "the last branch"])
def test_a_disk_keeps_what_it_has_where_its_snapshot_cannot_be_read(house: House, level: int) -> None:
    """It would go for what nobody can read; nor is anybody asked, or sent away, for that."""

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, b"old" * 512)
            await changes.copy_export("disk", "monday", read_only=True)
            await client.write(0, b"new" * 512)
            number = house.service._exports.get("monday").disk.number
            spoil(house.state_dir / "default.pool", lambda arena: arena.word_at(0, level, number), 1 << 40)
            complaint = (
                r"parts of the snapshot 'monday' cannot be read, .*`nbdzram clone monday NAME` offers what is left"
            )
            with pytest.raises(UserError, match=complaint):
                await changes.lose_export("disk", 0, "monday")
            with pytest.raises(UserError, match=complaint):
                await changes.rollback_export("disk", "monday", force=True)
            assert await client.read(0, 3) == b"new"
            await client.close()

    tell(story())


def test_a_disk_keeps_what_it_has_where_its_snapshot_is_not_what_was_written(house: House) -> None:
    """Its table can be read, and what that names did not become what was there: reads failed, and the rest was gone."""

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, noise(1))
            await changes.copy_export("disk", "monday", read_only=True)
            await client.write(0, noise(2))
            spoil(house.state_dir / "default.pool", lambda arena: arena.object_of(1) + BLOCK // 2)
            complaint = r"of the snapshot 'monday' block 0 is not what was written; .*; what the export holds would go"
            await client.close()
            with pytest.raises(UserError, match=complaint):
                await changes.rollback_export("disk", "monday", force=True)
            client = await house.client()
            assert await client.read(0, BLOCK) == noise(2)
            await client.close()
            assert not moment.concealed(house.pool())

    tell(story())


def test_a_disk_goes_back_though_what_it_shares_with_the_snapshot_is_not_what_was_written(house: House) -> None:
    """It is so in both, and nothing is lost by going back."""

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, noise(1) + noise(2))
            await changes.copy_export("disk", "monday", read_only=True)
            await client.write(BLOCK, noise(3))
            await client.close()
            spoil(house.state_dir / "default.pool", lambda arena: arena.object_of(1) + BLOCK // 2)
            await changes.rollback_export("disk", "monday", force=False)
            client = await house.client()
            assert await client.read(BLOCK, BLOCK) == noise(2)
            await client.close()

    tell(story())


def test_a_server_that_stops_does_not_wait_for_all_that_a_rollback_reads(house: House) -> None:
    class Stops(Exception):
        pass

    def go_on() -> None:
        raise Stops

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await changes.copy_export("disk", "tuesday", read_only=True)
            await client.write(0, noise(1))
            await changes.copy_export("disk", "wednesday", read_only=True)
            await client.close()
            exports = house.service._exports
            with pytest.raises(Stops):
                rollback_module.require_sound(exports.get("tuesday"), exports.get("wednesday"), go_on)
            assert not moment.concealed(house.pool())

    tell(story())


def test_a_disk_goes_back_to_a_snapshot_that_has_something_everywhere(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            for offset in range(0, 8 * MIB, MIB):
                await client.write(offset, b"old" * 512)
            await changes.copy_export("disk", "monday", read_only=True)
            await client.write(0, b"new" * 512)
            await client.close()
            await changes.rollback_export("disk", "monday", force=True)
            client = await house.client()
            assert await client.read(0, 3) == b"old"
            await client.close()

    tell(story())


def test_who_is_attached_keeps_a_disk_from_going_back_unless_forced(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "monday", read_only=True)
            client = await house.client()
            await client.write(0, b"new" * 512)
            with pytest.raises(UserError, match=r"cannot roll back the export 'disk': 1 client is attached .*--force"):
                await changes.rollback_export("disk", "monday", force=False)
            assert await client.read(0, 3) == b"new"
            await changes.rollback_export("disk", "monday", force=True)
            assert await client.at_end()
            await client.close()
            assert house.found().stored_bytes == 0

    tell(story())


def test_nobody_attaches_while_a_disk_goes_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "monday", read_only=True)
            told: list[tuple[int, str]] = []
            real = rollback_module.roll_back

            async def look(*given: Any) -> None:
                told.append(await house.refusal())
                await real(*given)

            monkeypatch.setattr(rollback_module, "roll_back", look)
            await changes.rollback_export("disk", "monday", force=False)
            assert told == [(Reply.ERR_UNKNOWN, "export 'disk' is being rolled back; try again in a moment")]

    tell(story())


def test_what_is_no_snapshot_of_the_disk_is_refused(house: House) -> None:
    house.exports = tuple(ExportConfig(name=name, size_bytes=MIB) for name in ("disk", "n" * 250))

    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "clone", read_only=False)
            await changes.copy_export("disk", "snapshot", read_only=True)
            await changes.add_pool("fast", 0, "fold")
            given = {**UNCHANGED, "read_only": True}
            await changes.add_export("elsewhere", MIB, pool="fast", **given)
            await changes.add_export("private", MIB, pool=None, private=True, **given)
            for snapshot, complaint in (
                ("clone", "'clone' is no snapshot: clients may write it"),
                ("disk", "'disk' is no snapshot"),
                ("elsewhere", "shares no blocks with 'disk'"),
                ("private", "shares no blocks with 'disk'"),
            ):
                with pytest.raises(UserError, match=complaint):
                    await changes.rollback_export("disk", snapshot, force=True)
            with pytest.raises(UserError, match="is too long for this; give it a shorter one first"):
                await changes.rollback_export("n" * 250, "snapshot", force=True)
            with pytest.raises(NoSuchExport):
                await changes.rollback_export("disk", "gone", force=True)
            assert len(house.pool().all_disks()) == 5

    tell(story())


def test_a_rollback_that_cannot_be_remembered_changes_nothing(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "monday", read_only=True)
            house.pool().disks()[0].write(0, b"new" * 512)
            (house.state_dir / "changes.new").mkdir()
            with pytest.raises(UserError, match="cannot remember the change"):
                await changes.rollback_export("disk", "monday", force=False)
            (house.state_dir / "changes.new").rmdir()
            assert house.found().stored_bytes == 4096
            assert len(house.pool().all_disks()) == 2

    tell(story())


@pytest.mark.parametrize("step", ["delete", "reveal", "rename"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_server_killed_in_the_middle_finishes_the_rollback(
    house: House, monkeypatch: pytest.MonkeyPatch, step: str, declared: bool
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.change_export("disk", **{**UNCHANGED, "description": "kept"})
            house.pool().disks()[0].write(0, b"old" * 512)
            await changes.copy_export("disk", "monday", read_only=True)
            house.pool().disks()[0].write(0, b"new" * 512)
            with monkeypatch.context() as patched, pytest.raises(UserError, match="killed here"):
                patched.setattr(rollback_module, "put_in_place", until(step))
                await changes.rollback_export("disk", "monday", force=False)
            assert house.remembered()["disk"]["rolled_back_from"] == SUBSTITUTE
        house.exports = house.exports if declared else ()
        async with house.open():
            assert sorted(names(house)) == ["disk", "monday"]
            assert house.found().description == "kept"
            assert {disk.name: disk.read(0, 3) for disk in house.pool().all_disks()} == dict.fromkeys(
                ("disk", "monday"), b"old"
            )
        assert [entry["rolled_back_from"] for entry in house.remembered().values()] == [None, None]

    tell(story())


def until(step: str) -> Callable[..., None]:
    """What takes the disk's place, up to this step and without it."""

    def put(old: Any, copy: Any, _: str) -> None:
        if step != "delete":
            old.pool.delete(old)
        if step == "rename":
            moment.reveal(copy)
        raise EngineError("killed here")

    return put


def test_a_copy_that_nobody_remembers_is_gone_at_the_next_start(house: House) -> None:
    async def story() -> None:
        async with house.open():
            (copy,) = moment.snapshot_together([house.pool().disks()[0]], [SUBSTITUTE])
            moment.finish(copy)
        async with house.open():
            assert [disk.name for disk in house.pool().all_disks()] == ["disk"]

    tell(story())


# -- by the clock ----------------------------------------------------------------------------------------------------

HOURLY = ExportConfig(name="disk", size_bytes=8 * MIB, snapshots_seconds=3600, snapshots_keep=3)


async def at(schedule: Schedule, now: datetime, *wanted: ExportConfig) -> None:
    schedule.consider(wanted or (HOURLY,), now)
    await schedule.stop()


def taken(house: House) -> list[str]:
    return sorted(name.removeprefix("disk@auto-20261127T") for name in names(house) if name != "disk")


def test_a_snapshot_is_taken_each_hour_and_the_last_ones_are_kept(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            schedule = Schedule(house.service._exports, changes)
            await at(schedule, NOON)
            assert taken(house) == []  # there is nothing in it yet
            client = await house.client()
            for hour in range(5):
                await client.write(hour * 4096, bytes([hour + 1]) * 4096)
                await at(schedule, NOON + hour * HOUR)
                await at(schedule, NOON + hour * HOUR + timedelta(seconds=3599))
            assert taken(house) == ["140000Z", "150000Z", "160000Z"]
            await at(schedule, NOON + 5 * HOUR)
            assert taken(house) == ["140000Z", "150000Z", "160000Z"]  # nothing was written
            await client.close()
            client = await house.client(b"disk@auto-20261127T150000Z")
            assert await client.read(3 * 4096, 8192) == b"\4" * 4096 + bytes(4096)
            await client.close()
            assert house.found("disk@auto-20261127T150000Z").read_only
        async with house.open() as changes:
            again = Schedule(house.service._exports, changes)
            await at(again, NOON + 4 * HOUR + timedelta(seconds=3599))
            assert len(taken(house)) == 3
            await at(again, NOON + 5 * HOUR)
            assert taken(house) == ["140000Z", "150000Z", "160000Z"]  # who has just started looks at what there is
            await changes.remove_export("disk@auto-20261127T160000Z", force=False)
            await at(again, NOON + 6 * HOUR)  # the last one that was taken is gone
            assert taken(house) == ["140000Z", "150000Z", "180000Z"]

    tell(story())


@pytest.mark.parametrize("operation", [Command.TRIM, Command.WRITE_ZEROES])
def test_what_was_given_back_or_zeroed_is_a_change_that_a_snapshot_is_taken_of(house: House, operation: int) -> None:
    async def story() -> None:
        async with house.open() as changes:
            schedule = Schedule(house.service._exports, changes)
            client = await house.client()
            await client.write(0, b"1" * 4096)
            await at(schedule, NOON)
            assert (await client.call(operation, 0, 4096)).error == 0
            await at(schedule, NOON + HOUR)
            assert taken(house) == ["120000Z", "130000Z"]
            await client.close()

    tell(story())


def test_the_longest_name_that_may_be_declared_has_snapshots(house: House) -> None:
    name = "x" * (MAX_NAME_BYTES - len(STAMPED))
    house.exports = (replace(HOURLY, name=name),)

    async def story() -> None:
        async with house.open() as changes:
            house.service._exports.get(name).disk.write(0, b"1" * 4096)
            await at(Schedule(house.service._exports, changes), NOON, *house.exports)
            assert names(house) == [name, f"{name}@auto-20261127T120000Z"]

    name_of_snapshots(name)
    tell(story())


def test_what_an_operator_changes_is_a_change_that_a_snapshot_is_taken_of(house: House) -> None:
    """No client asked for it, and none of it is in the last snapshot."""

    async def story() -> None:
        async with house.open() as changes:
            schedule = Schedule(house.service._exports, changes)
            client = await house.client()
            await client.write(0, b"1" * 4096)
            await at(schedule, NOON)
            await client.write(0, b"2" * 4096)
            await at(schedule, NOON + HOUR)
            await client.close()
            await changes.rollback_export("disk", "disk@auto-20261127T120000Z", force=True)
            await at(schedule, NOON + 2 * HOUR)
            assert taken(house) == ["120000Z", "130000Z", "140000Z"]
            await changes.resize_export("disk", 16 * MIB, yes=False, force=False)
            await at(schedule, NOON + 3 * HOUR)
            assert taken(house) == ["130000Z", "140000Z", "150000Z"]
            await changes.reset_export("disk", force=True)
            await at(schedule, NOON + 4 * HOUR)
            assert taken(house) == ["140000Z", "150000Z", "160000Z"]
            await at(schedule, NOON + 5 * HOUR)
            assert len(taken(house)) == 3

    tell(story())


def test_what_clients_may_write_is_no_snapshot_that_goes(house: House) -> None:
    """Somebody took one for his machine: what that wrote since is nowhere else."""

    async def story() -> None:
        async with house.open() as changes:
            schedule, one = Schedule(house.service._exports, changes), replace(HOURLY, snapshots_keep=1)
            disk = house.service._exports.get("disk").disk
            for hour in range(4):
                if hour == 1:
                    await changes.change_export("disk@auto-20261127T120000Z", **{**UNCHANGED, "read_only": False})
                disk.write(0, bytes([hour + 1]) * 4096)
                await at(schedule, NOON + hour * HOUR, one)
            assert taken(house) == ["120000Z", "150000Z"]
            await changes.change_export("disk@auto-20261127T150000Z", **{**UNCHANGED, "read_only": False})
            await at(schedule, NOON + 4 * HOUR, one)
            assert taken(house) == ["120000Z", "150000Z", "160000Z"]

    tell(story())


def test_a_snapshot_that_somebody_uses_stays_and_goes_later(house: House, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with house.open() as changes:
            schedule, one = Schedule(house.service._exports, changes), replace(HOURLY, snapshots_keep=1)
            disk = await house.client()
            await disk.write(0, b"1" * 4096)
            await at(schedule, NOON, one)
            user = await house.client(b"disk@auto-20261127T120000Z")
            for hour in (1, 2):
                await disk.write(0, bytes([hour]) * 4096)
                await at(schedule, NOON + hour * HOUR, one)
            assert taken(house) == ["120000Z", "140000Z"]
            assert "a snapshot beyond the 1 that are kept stays: cannot remove the export" in caplog.text
            await user.close()
            async with asyncio.timeout(60):
                while house.found("disk@auto-20261127T120000Z").connections:
                    await disk.read(0, 512)
            await disk.write(0, b"3" * 4096)
            await at(schedule, NOON + 3 * HOUR, one)
            assert taken(house) == ["150000Z"]
            await disk.close()

    tell(story())


def test_snapshots_of_a_clock_that_was_ahead_are_the_first_to_go(house: House) -> None:
    """They were taken before all others; each later one went at once, as if it were the oldest."""
    one = replace(HOURLY, snapshots_keep=2)

    async def story() -> None:
        async with house.open() as changes:
            schedule = Schedule(house.service._exports, changes)
            client = await house.client()
            for hour in (6, 7, 0, 1):  # the clock is set right between the second and the third
                await client.write(0, bytes([hour + 1]) * 4096)
                await at(schedule, NOON + hour * HOUR, one)
            assert taken(house) == ["120000Z", "130000Z"]
            await client.close()

    tell(story())


def test_a_clock_that_is_set_back_and_a_snapshot_that_fails_stop_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            schedule = Schedule(house.service._exports, changes)
            client = await house.client()
            await client.write(0, b"1" * 4096)
            await at(schedule, NOON)
            await client.write(0, b"2" * 4096)
            (house.state_dir / "changes.new").mkdir()
            await at(schedule, NOON - HOUR)
            (house.state_dir / "changes.new").rmdir()
            assert "no snapshot of the export 'disk' was taken: cannot remember the change" in caplog.text
            await at(schedule, NOON - HOUR + timedelta(seconds=1))
            assert taken(house) == ["120000Z"]  # tried again when the next one is due
            await at(schedule, NOON)
            assert taken(house) == ["120000Z"]  # of this second there is one
            await at(schedule, NOON + HOUR)
            assert taken(house) == ["120000Z", "130000Z"]
            assert not schedule._is_due(replace(HOURLY, name="gone"), NOON)
            await client.close()

    tell(story())


def test_a_server_takes_them_by_itself(house: House) -> None:
    house.exports = (replace(HOURLY, snapshots_seconds=0.01),)

    async def story() -> None:
        async with house.open():
            client = await house.client()
            await client.write(0, b"1" * 4096)
            async with asyncio.timeout(60):
                while not taken(house):
                    await client.read(0, 512)
            await client.close()

    tell(story())
