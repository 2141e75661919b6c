"""Tenants of one pool: what one stores is kept from the others, unless the operator says otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbdzram.config import NOBODY, Access, Dedup, ExportConfig, PoolConfig
from nbdzram.errors import UserError
from nbdzram.server.inventory import require_trust
from nbdzram.server.state import FILE_NAME
from tests.unit.engine.blocks import BLOCK, noise
from tests.unit.server.house import MIB, UNCHANGED, House, tell

RULES = UNCHANGED | {"allow_addresses": ["10.0.0.0/8"]}
INLINE = (PoolConfig(dedup=Dedup.INLINE),)


def strangers(**more: Any) -> tuple[ExportConfig, ...]:
    return (
        ExportConfig(name="one", size_bytes=MIB, allow_addresses=("10.0.0.1/32",), **more),
        ExportConfig(name="two", size_bytes=MIB, allow_addresses=("10.0.0.2/32",), **more),
    )


def test_a_declared_private_export_keeps_its_blocks_to_itself_also_after_a_restart(house: House) -> None:
    async def story() -> None:
        house.exports = (
            ExportConfig(name="secret", size_bytes=MIB, private=True),
            ExportConfig(name="open", size_bytes=MIB),
        )
        for _ in range(2):
            async with house.open(pools=INLINE) as changes:
                added = await changes.add_export(f"more{_}", MIB, pool=None, private=True, **UNCHANGED)
                assert added.private
                assert (house.found("secret").private, house.found("open").private) == (True, False)
                for export in house.service.status().exports:
                    disk = next(disk for disk in house.pool().disks() if disk.name == export.name)
                    disk.write(0, noise(1))
                copy = await changes.copy_export("secret", f"copy{_}", read_only=False)
                assert copy.private
                private = sum(export.private for export in house.service.status().exports) - 1 - _
                assert house.pool().stats().objects == 1 + private

    tell(story())


def test_a_name_that_is_declared_private_is_added_to_no_disk_that_is_not(house: House) -> None:
    """As it is refused to a copy, a renamed disk and a received one. Only who speaks to the socket can ask for it."""

    async def story() -> None:
        house.exports = (ExportConfig(name="secret", size_bytes=MIB, private=True),)
        async with house.open() as changes:
            await changes.remove_export("secret", force=False)
            with pytest.raises(UserError, match="declared private"):
                await changes.add_export("secret", MIB, pool=None, private=False, **UNCHANGED)
            assert (await changes.add_export("secret", MIB, pool=None, **UNCHANGED)).private

    tell(story())


def test_inline_folding_is_refused_between_exports_that_admit_different_clients(house: House) -> None:
    async def story() -> None:
        async with house.open(pools=INLINE) as changes:
            await changes.add_export("like it", MIB, pool=None, **UNCHANGED)
            with pytest.raises(UserError, match=r"folds inline.* tell_sharing = true"):
                await changes.add_export("stranger", MIB, pool=None, **RULES)
            with pytest.raises(UserError, match="folds inline"):
                await changes.change_export("like it", **RULES)
            assert house.found("like it").admits == "everyone"
            await changes.change_pool("default", None, "fold")
            await changes.change_export("like it", **RULES)
            with pytest.raises(UserError, match="folds inline"):
                await changes.change_pool("default", None, "inline")
            assert not house.pool().inline_dedup

    tell(story())


def test_a_pool_that_tells_sharing_folds_inline_for_strangers_too(house: House) -> None:
    async def story() -> None:
        house.exports = strangers()
        async with house.open(pools=(PoolConfig(dedup=Dedup.INLINE, tell_sharing=True),)) as changes:
            await changes.add_export("three", MIB, pool=None, **UNCHANGED)
            assert house.pool().inline_dedup
            assert house.service.status().pools[0].tells_sharing

    tell(story())


def test_declared_strangers_in_an_inline_pool_are_served_and_folded_later(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        house.exports = strangers()
        async with house.open(pools=INLINE):
            assert not house.pool().inline_dedup
            assert house.service.status().pools[0].dedup == "fold"
        assert "admit different clients" in caplog.text

    tell(story())


def test_an_export_that_is_declared_private_and_was_made_without_is_told_of(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with house.open():
            house.pool().disks()[0].write(0, noise(1) * (MIB // BLOCK // 256))
        house.exports = (ExportConfig(name="disk", size_bytes=8 * MIB, private=True),)
        async with house.open():
            assert not house.found().private
        assert "declared private, but was made without" in caplog.text

    tell(story())


def test_an_export_that_was_made_private_stays_so_and_that_is_told(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        for private in (True, False):
            house.exports = (ExportConfig(name="secret", size_bytes=MIB, private=private),)
            async with house.open():
                assert house.found("secret").private
                assert ("was made private and stays so" in caplog.text) is not private

    tell(story())


def test_a_limit_that_was_changed_at_run_time_leaves_a_pools_other_settings(house: House) -> None:
    async def story() -> None:
        pools = (PoolConfig(tell_sharing=True),)
        async with house.open(pools=pools) as changes:
            await changes.change_pool("default", 64 * MIB, None)
        async with house.open(pools=pools):
            assert house.pool().mem_limit == 64 * MIB
            assert house.pool().tells_sharing

    tell(story())


def test_what_a_pool_checks_and_tells_is_changed_at_run_time_and_remembered(house: House) -> None:
    """Each by itself, and until it is declared otherwise."""

    def now() -> tuple[bool, bool, int]:
        return house.pool().verify, house.pool().tells_sharing, house.pool().mem_limit

    async def story() -> None:
        async with house.open() as changes:
            await changes.change_pool("default", None, None, verify=False)
            await changes.change_pool("default", 64 * MIB, None)
            await changes.change_pool("default", None, None, tell_sharing=True)
            assert now() == (False, True, 64 * MIB)
            told = house.service.status().pools[0]
            assert (told.verify, told.tells_sharing) == (False, True)
            await changes.add_pool("fast", 0, "fold", verify=False, tell_sharing=True)
        async with house.open():
            assert now() == (False, True, 64 * MIB)
            fast = house.service._pools["fast"].pool
            assert (fast.verify, fast.tells_sharing) == (False, True)
        async with house.open(pools=(PoolConfig(verify=False),)):
            assert now() == (False, True, 64 * MIB)
        async with house.open():
            assert now() == (True, True, 64 * MIB), "what ended came back with its declaration of then"
        async with house.open(pools=(PoolConfig(mem_limit=32 * MIB),)):
            assert now() == (True, True, 32 * MIB)
        async with house.open():
            assert now() == (True, True, 0)

    tell(story())


def test_a_pool_that_folds_inline_for_strangers_goes_on_telling(house: House) -> None:
    async def story() -> None:
        house.exports = strangers()
        async with house.open(pools=(PoolConfig(dedup=Dedup.INLINE, tell_sharing=True),)) as changes:
            with pytest.raises(UserError, match="folds inline"):
                await changes.change_pool("default", None, None, tell_sharing=False)
            assert house.pool().tells_sharing
            await changes.change_pool("default", None, "fold", tell_sharing=False)
            await changes.change_pool("default", None, "inline", tell_sharing=True)
            assert (house.pool().inline_dedup, house.pool().tells_sharing) == (True, True)

    tell(story())


def test_a_pool_that_was_remembered_before_is_as_declared_in_what_was_not_known_then(house: House) -> None:
    pools = (PoolConfig(verify=False, tell_sharing=True),)

    async def story() -> None:
        async with house.open(pools=pools) as changes:
            await changes.change_pool("default", 64 * MIB, None)
        file = house.state_dir / FILE_NAME
        remembered = json.loads(file.read_text())
        for entry in remembered["pools"].values():
            del entry["verify"], entry["tell_sharing"]
        file.write_text(json.dumps(remembered))
        async with house.open(pools=pools):
            assert (house.pool().mem_limit, house.pool().verify, house.pool().tells_sharing) == (64 * MIB, False, True)

    tell(story())


def test_private_exports_may_admit_whom_they_like_in_a_pool_that_folds_inline(house: House) -> None:
    """Nobody finds their blocks, and they find nobody's."""

    async def story() -> None:
        house.exports = strangers(private=True)
        async with house.open(pools=INLINE) as changes:
            assert house.pool().inline_dedup
            await changes.add_export("open", MIB, pool=None, **UNCHANGED)
            await changes.add_export("secret", MIB, pool=None, private=True, **RULES)
            await changes.change_export("secret", **(RULES | {"allow_addresses": ["10.9.0.0/16"]}))
            with pytest.raises(UserError, match="folds inline"):
                await changes.add_export("stranger", MIB, pool=None, **RULES)

    tell(story())


def test_a_limit_that_is_refused_is_not_remembered(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            with pytest.raises(UserError, match="restart the server"):
                await changes.change_pool("default", 1 << 50, None)
            assert house.pool().mem_limit == 0
        async with house.open():
            assert house.pool().mem_limit == 0

    tell(story())


def test_whom_nobody_is_admitted_to_is_no_stranger() -> None:
    """Two lists are; one, and any number of exports of which nobody knows whom they admit, are not."""
    lists = [Access(addresses=(f"10.0.{number}.0/24",)) for number in range(2)]
    for rules in ([], [NOBODY], [lists[0], NOBODY, lists[0], NOBODY]):
        require_trust("default", rules, tells_sharing=False)
    require_trust("default", lists, tells_sharing=True)
    with pytest.raises(UserError, match="would admit different clients"):
        require_trust("default", [NOBODY, *lists], tells_sharing=False)
