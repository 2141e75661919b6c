"""Who is admitted to an export, and how: through copies, removals, restarts and changes at run time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.config import NOBODY, ExportConfig, PoolConfig
from nbdzram.errors import UserError
from nbdzram.nbd.constants import Reply
from nbdzram.server import state as state_module
from nbdzram.server.state import FILE_NAME, State
from tests.unit.server.house import (
    MIB,
    UNCHANGED,
    House,
    tell,
)


def test_a_copy_admits_whom_its_origin_admits(house: House) -> None:
    house.exports = (ExportConfig(name="disk", size_bytes=MIB, allow_certificates=("vm1.example",)),)

    async def story() -> None:
        async with house.open() as changes:
            await changes.copy_export("disk", "snap", read_only=True)
            await changes.copy_export("snap", "clone", read_only=False)
            for name in ("disk", "snap", "clone"):
                assert house.found(name).allow_certificates == ("vm1.example",)
                assert (await house.refusal(name.encode()))[0] == Reply.ERR_UNKNOWN
            assert (house.found("snap").read_only, house.found("clone").read_only) == (True, False)

    tell(story())


def test_a_declared_export_that_is_removed_and_added_again_has_its_declared_rules(house: House) -> None:
    house.exports = (
        ExportConfig(name="disk", size_bytes=MIB, read_only=True, description="d", allow_addresses=("10.0.0.0/8",)),
    )

    async def story() -> None:
        async with house.open() as changes:
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", 2 * MIB, pool=None, **UNCHANGED)
            found = house.found()
            assert (found.allow_addresses, found.read_only, found.description) == (("10.0.0.0/8",), True, "d")
            await changes.remove_export("disk", force=False)
            await changes.add_export(
                "disk", MIB, pool=None, **{**UNCHANGED, "read_only": False, "allow_addresses": ("10.1.0.0/16",)}
            )
            assert (house.found().allow_addresses, house.found().read_only) == (("10.1.0.0/16",), False)
            await changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ("10.2.0.0/16",)})
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", MIB, pool=None, **UNCHANGED)
            assert house.found().allow_addresses == ("10.2.0.0/16",)

    tell(story())


def test_an_export_that_nobody_declares_is_removed_and_added_again_for_those_whom_it_admitted(house: House) -> None:
    rules = {**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)}

    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **rules)
            await changes.add_export("old", MIB, pool=None, **rules)
            await changes.rename_export("old", "new")
            await changes.remove_export("mine", force=False)
        async with house.open() as changes:
            for name in ("mine", "old"):
                await changes.add_export(name, MIB, pool=None, **UNCHANGED)
                assert house.found(name).allow_addresses == ("10.0.0.0/8",)
            assert house.found("new").allow_addresses == ("10.0.0.0/8",)
            await changes.change_export("mine", **{**UNCHANGED, "allow_addresses": ()})
            await changes.remove_export("mine", force=False)
            await changes.add_export("mine", MIB, pool=None, **UNCHANGED)
            assert house.found("mine").admits == "everyone"
            await changes.add_export("never there", MIB, pool=None, **UNCHANGED)
            assert house.found("never there").admits == "everyone"

    tell(story())


def test_a_server_that_ends_between_a_removal_and_its_memory_opens_the_name_to_nobody_new(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **{**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)})
            with monkeypatch.context() as ending:
                ending.setattr(State, "remember_removal", lambda *_: None)
                await changes.remove_export("mine", force=False)
        async with house.open() as changes:
            await changes.add_export("mine", MIB, pool=None, **UNCHANGED)
            assert house.found("mine").allow_addresses == ("10.0.0.0/8",)

    tell(story())


def test_rules_of_exports_that_are_gone_are_kept_for_as_many_names_as_a_pool_has(tmp_path: Path) -> None:
    state = State(tmp_path)
    most = state_module.FORMER_MAX
    for number in range(5):
        state.remember_removal(f"disk {number}", None, NOBODY)
    assert list(State(tmp_path).changes.former) == [f"disk {number}" for number in range(5)]
    state.remember_removal("disk 1", None, NOBODY)
    assert list(state.changes.former)[-1] == "disk 1"
    state.changes = replace(state.changes, former={f"disk {number}": NOBODY for number in range(most)})
    state.remember_removal("one more", None, NOBODY)
    assert len(state.changes.former) == most
    assert "disk 0" not in state.changes.former


def test_rules_changed_at_run_time_end_who_no_longer_qualifies_and_outlive_a_restart(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "description": "still open"})
            await client.write(0, b"w" * 512)  # nothing that concerns it was changed
            await changes.change_export("disk", **{**UNCHANGED, "allow_certificates": ("vm1.example",)})
            assert await client.at_end()
            assert (await house.refusal())[0] == Reply.ERR_UNKNOWN
            await client.close()
        house.exports = ()
        async with house.open() as changes:
            found = house.found()
            assert (found.admits, found.allow_certificates, found.description) == (
                "listed",
                ("vm1.example",),
                "still open",
            )
            await changes.change_export("disk", **{**UNCHANGED, "allow_certificates": (), "allow_addresses": ()})
            client = await house.client()
            assert await client.read(0, 512) == b"w" * 512
            await client.close()

    tell(story())


def test_read_only_ends_who_was_told_that_it_may_write_and_no_reader(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            writer = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "read_only": True})
            assert await writer.at_end()
            reader = await house.client()
            await changes.change_export("disk", **{**UNCHANGED, "read_only": True, "description": "again"})
            await changes.change_export("disk", **{**UNCHANGED, "read_only": False})
            assert await reader.read(0, 512) == bytes(512)
            await reader.close()
            await writer.close()

    tell(story())


def test_rules_that_were_not_known_are_known_once_one_is_given(house: House) -> None:
    async def story() -> None:
        async with house.open():
            pass
        (house.state_dir / FILE_NAME).unlink()
        house.exports = ()
        async with house.open() as changes:
            assert house.found().admits == "nobody"
            assert (await house.refusal())[0] == Reply.ERR_UNKNOWN
            await changes.change_export("disk", **{**UNCHANGED, "description": "says nothing of rules"})
            assert house.found().admits == "nobody"
            await changes.change_export("disk", **{**UNCHANGED, "allow_addresses": ("10.0.0.0/8",)})
            assert house.found().admits == "listed"
            await (await house.client()).close()  # local: of a unix socket its mode decided

    tell(story())


def test_a_pool_that_is_added_again_comes_with_its_disks_and_their_rules(house: House) -> None:
    """And is not taken for an empty one, which may be removed."""
    fast = (PoolConfig(), PoolConfig(name="fast"))
    kept = ExportConfig(name="kept", size_bytes=MIB, pool="fast", allow_addresses=("10.0.0.0/8",))

    async def story() -> None:
        async with house.open(pools=fast, exports=(*house.exports, kept)):
            house.service._exports.get("kept").disk.write(0, b"k" * 512)
        async with house.open() as changes:
            assert [export.name for export in house.service.status().exports] == ["disk"]
            await changes.add_pool("fast", 0, "fold")
            assert house.found("kept").allow_addresses == ("10.0.0.0/8",)
            assert house.service._exports.get("kept").disk.read(0, 512) == b"k" * 512
            with pytest.raises(UserError, match="holds the export 'kept'"):
                await changes.remove_pool("fast")
        (house.state_dir / "other.pool").write_bytes((house.state_dir / "fast.pool").read_bytes())
        async with house.open() as changes:
            with pytest.raises(UserError, match="holds an export 'kept', and there is one of that name"):
                await changes.add_pool("other", 0, "fold")
            assert {pool.name for pool in house.service.status().pools} == {"default", "fast"}
            (house.state_dir / "other.pool").rename(house.state_dir / "away")
            house.service._state.require_arenas()  # it is not served, and a takeover does not miss it

    tell(story())


def test_a_pool_that_is_added_again_brings_back_no_removed_export(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            await changes.add_pool("fast", 0, "fold")
            await changes.remove_export("disk", force=False)
            await changes.add_export("disk", MIB, pool="fast", **UNCHANGED)
            await changes.remove_export("disk", force=False)
            await changes.remove_pool("fast")
            await changes.add_pool("fast", 0, "fold")
            assert house.remembered()["disk"]["removed"]
        async with house.open():
            assert house.service.status().exports == ()

    tell(story())
