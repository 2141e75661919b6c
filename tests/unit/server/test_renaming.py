"""Renaming at run time: attached clients go on, all that belongs to the disk goes with it, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import Access, CheckpointConfig, ExportConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import ExportExists, NoSuchExport, UserError
from nbdzram.metrics.families import EXPORT
from nbdzram.nbd.constants import Reply
from nbdzram.server.state import State
from tests.unit.server.house import MIB, UNCHANGED, Delegate, House, tell

RULES: dict[str, Any] = {**UNCHANGED, "description": "build trees", "allow_addresses": ("127.0.0.0/8",)}


def refuses(*_: Any) -> None:
    raise UserError("no room")


def series(house: House) -> set[str]:
    """The export's names in the metrics."""
    status = house.service.status()
    return {labels.split('export="')[1].split('"')[0] for family in EXPORT for labels, _ in family.samples.of(status)}


def test_attached_clients_go_on_and_who_comes_finds_the_new_name(house: House) -> None:
    house.exports = ()

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("disk", MIB, pool=None, **RULES)
            client = await house.client()
            await client.write(0, b"w" * 512)
            answer = await changes.rename_export("disk", "trees")
            assert list(answer.lines()) == ["renamed disk to trees"]
            assert await client.read(0, 512) == b"w" * 512
            await client.write(512, b"x" * 512)
            assert [attached.export for attached in house.service.clients()] == ["trees"]
            assert (await house.refusal())[0] == Reply.ERR_UNKNOWN
            newcomer = await house.client(b"trees")
            assert await newcomer.read(0, 1024) == b"w" * 512 + b"x" * 512
            await client.close()
            await newcomer.close()
            found = house.found("trees")
            assert (found.description, found.allow_addresses) == ("build trees", ("127.0.0.0/8",))
            assert found.operations["write"].requests == 2  # what it counted is its own
            assert series(house) == {"trees"}
            await changes.add_export("disk", MIB, pool=None, **UNCHANGED)  # the old name is free
        async with house.open():
            assert {export.name for export in house.service.status().exports} == {"disk", "trees"}
            found = house.found("trees")
            assert (found.description, found.allow_addresses, found.stored_bytes) == (
                "build trees",
                ("127.0.0.0/8",),
                4096,
            )

    tell(story())


def test_a_declared_export_that_was_renamed_stays_so_until_it_is_declared_otherwise(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            house.pool().disks()[0].write(0, b"w" * 512)
            lines = list((await changes.rename_export("disk", "trees")).lines())
            assert lines[1] == (
                "disk is declared in the configuration: declare it as trees; until then the next start offers trees as "
                "it is, and makes no disk"
            )
        async with house.open():
            assert [export.name for export in house.service.status().exports] == ["trees"]
            assert house.found("trees").stored_bytes == 4096
        house.exports = (replace(house.exports[0], name="trees", description="declared now"),)
        async with house.open():
            assert [export.name for export in house.service.status().exports] == ["trees"]
            assert (house.found("trees").stored_bytes, house.found("trees").description) == (4096, "declared now")

    tell(story())


def test_without_a_state_directory_a_declared_export_comes_again_under_its_old_name(house: House) -> None:
    async def story() -> None:
        async with house.open(state_dir=None) as changes:
            answer = await changes.rename_export("disk", "trees")
            assert "the next start makes it again, empty, unless it is declared as trees" in list(answer.lines())[1]

    tell(story())


def test_with_checkpoints_a_declared_export_stays_under_its_new_name(house: House, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"state_dir": None, "checkpoint": CheckpointConfig(directory=tmp_path / "kept")}

    async def story() -> None:
        async with house.open(**kept) as changes:
            answer = await changes.rename_export("disk", "trees")
            assert "the next start offers trees as it is, and makes no disk" in list(answer.lines())[1]
        async with house.open(**kept):
            assert [export.name for export in house.service.status().exports] == ["trees"]

    tell(story())


def test_names_that_are_taken_wrong_or_unknown_are_refused(house: House) -> None:
    house.exports = tuple(ExportConfig(name=name, size_bytes=MIB) for name in ("disk", "other"))

    async def story() -> None:
        async with house.open() as changes:
            with pytest.raises(ExportExists, match="there is an export 'other' already"):
                await changes.rename_export("disk", "other")
            with pytest.raises(UserError, match="not an export's name"):
                await changes.rename_export("disk", "a\nb")
            with pytest.raises(NoSuchExport):
                await changes.rename_export("gone", "new")
            assert [export.name for export in house.service.status().exports] == ["disk", "other"]

    tell(story())


def test_a_renaming_that_the_engine_refuses_or_that_cannot_be_remembered_changes_nothing(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            before = house.remembered()
            service = changes._pools["default"]

            pool, service.pool = service.pool, Delegate(service.pool, rename=refuses)
            with pytest.raises(UserError, match="no room"):
                await changes.rename_export("disk", "trees")
            service.pool = pool
            assert house.remembered() == before
            (house.state_dir / "changes.new").mkdir()
            with pytest.raises(UserError, match="cannot remember the change"):
                await changes.rename_export("disk", "trees")
            (house.state_dir / "changes.new").rmdir()
            assert [disk.name for disk in house.pool().disks()] == ["disk"]
            assert house.found().name == "disk"

    tell(story())


@pytest.mark.parametrize("declared", [True, False])
def test_a_server_killed_between_remembering_and_renaming_finishes_it(house: House, declared: bool) -> None:
    """Of a declared one the old name is remembered as removed: to take that at its word would destroy the disk."""

    async def story() -> None:
        async with house.open() as changes:
            await changes.change_export("disk", **RULES)
            house.pool().disks()[0].write(0, b"w" * 512)
            export = house.service._exports.get("disk")
            record = changes._record(export)
        state = State(house.state_dir)
        of_old = replace(record, removed=True) if declared else None
        state.remember_renaming("trees", replace(record, declared=None), "disk", of_old)
        house.exports = house.exports if declared else ()
        async with house.open():
            assert [export.name for export in house.service.status().exports] == ["trees"]
            found = house.found("trees")
            assert (found.stored_bytes, found.allow_addresses) == (4096, ("127.0.0.0/8",))
        assert [entry["renamed_from"] for entry in house.remembered().values()] == [None] * (1 + declared)

    tell(story())


@pytest.mark.parametrize("noted", [True, False])
def test_a_renaming_that_was_done_is_not_done_again_to_a_namesake(
    house: House, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old name may be a new disk's at the next start. Not noted: there was no room to say that it is done."""
    house.exports = ()

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("disk", MIB, pool=None, **UNCHANGED)
            with monkeypatch.context() as patched:
                if not noted:
                    patched.setattr(State, "remember_export", refuses)
                await changes.rename_export("disk", "trees")
            await changes.add_export("disk", MIB, pool=None, **UNCHANGED)
        with Pool(path=str(house.state_dir / "default.pool")) as pool:  # the arena of an older day
            pool.delete(next(disk for disk in pool.disks() if disk.name == "trees"))
        async with house.open():
            assert [export.name for export in house.service.status().exports] == ["disk"]

    tell(story())


def test_the_rules_that_a_renamed_disk_is_remembered_with_are_those_of_its_last_name(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.rename_export("disk", "one")
            await changes.change_export("one", **RULES)
            await changes.rename_export("one", "two")
        async with house.open():
            assert house.service._exports.get("two").access == Access(addresses=("127.0.0.0/8",))
        assert set(house.remembered()) == {"disk", "two"}

    tell(story())
