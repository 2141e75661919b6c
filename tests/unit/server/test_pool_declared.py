"""What a pool is where it is declared, was changed at run time, and is declared otherwise since: value by value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import Dedup, ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.server.opening import declared_as, effective_pool, open_pools
from nbdzram.server.service import Service
from nbdzram.server.state import PoolChange, State
from tests.unit.server.house import UNCHANGED, tell

MIB = 1 << 20
DECLARED = PoolConfig(mem_limit=64 * MIB, dedup=Dedup.FOLD, verify=True, tell_sharing=True)
SAID: dict[str, Any] = {"mem_limit": 32 * MIB, "dedup": "inline", "verify": False, "tell_sharing": False}
SINCE: dict[str, Any] = {"mem_limit": 128 * MIB, "dedup": Dedup.INLINE, "verify": False, "tell_sharing": False}
CHANGE = PoolChange(**SAID, declared=declared_as(DECLARED))


def values(pool: PoolConfig) -> dict[str, Any]:
    return {key: getattr(pool, key) for key in SAID}


def test_what_was_said_holds_where_nothing_is_declared_otherwise() -> None:
    assert values(effective_pool(DECLARED, CHANGE)) == SAID


@pytest.mark.parametrize("key", SAID)
def test_one_value_that_is_declared_otherwise_takes_no_other_back(key: str) -> None:
    """Who stopped clients from finding out what others store does not have that undone by a larger limit."""
    now = dataclasses.replace(DECLARED, **{key: SINCE[key]})
    assert values(effective_pool(now, CHANGE)) == {**SAID, key: SINCE[key]}


@pytest.mark.parametrize("key", SAID)
def test_one_value_that_was_declared_otherwise_then_is_as_declared_now(key: str) -> None:
    then = declared_as(dataclasses.replace(DECLARED, **{key: SINCE[key]}))
    found = effective_pool(DECLARED, dataclasses.replace(CHANGE, declared=then))
    assert values(found) == {**SAID, key: getattr(DECLARED, key)}


def test_what_was_said_of_a_pool_that_nobody_declared_ends_with_its_declaration() -> None:
    assert effective_pool(DECLARED, dataclasses.replace(CHANGE, declared=None)) == DECLARED
    assert effective_pool(DECLARED, None) == DECLARED


def test_what_an_earlier_version_did_not_remember_is_as_declared() -> None:
    change = dataclasses.replace(CHANGE, verify=None, tell_sharing=None)
    found = values(effective_pool(DECLARED, change))
    assert found == {**SAID, "verify": DECLARED.verify, "tell_sharing": DECLARED.tell_sharing}


@pytest.mark.parametrize("is_declared", [False, True], ids=["added at run time", "declared"])
def test_a_start_opens_it_so(*, is_declared: bool) -> None:
    state = State(None)
    state.remember_pool("default", CHANGE if is_declared else dataclasses.replace(CHANGE, declared=None))
    wanted = [dataclasses.replace(DECLARED, mem_limit=128 * MIB)] if is_declared else []
    (pool,) = open_pools(wanted, state).values()
    with pool:
        assert pool.mem_limit == (128 if is_declared else 32) * MIB
        assert (pool.inline_dedup, pool.verify, pool.tells_sharing) == (True, False, False)


def test_what_a_reload_declares_ends_what_was_said_also_where_it_is_the_same(tmp_path: Path) -> None:
    """Nothing is changed then, but it is remembered: the declaration of then, once more, is one of its own."""
    path = tmp_path / "socket"

    def config(mem_limit: int, description: str) -> ServerConfig:
        return ServerConfig(
            exports=(ExportConfig(name="disk", size_bytes=MIB, description=description),),
            pools=(PoolConfig(mem_limit=mem_limit),),
            tcp=(),
            unix=(UnixAddress(path=path),),
            state_dir=tmp_path / "state",
        )

    async def story() -> None:
        then, now = config(64 * MIB, "first"), config(32 * MIB, "second")
        service = Service(then, reread=lambda: now)
        await service.start()
        await service.changes.change_pool("default", 32 * MIB, None)
        await service.changes.change_export("disk", **{**UNCHANGED, "description": "second"})
        assert (await service.reload()).changed == ()
        await service.stop()
        service = Service(then)
        await service.start()
        status = service.status()
        await service.stop()
        assert (status.pools[0].stats.mem_limit, status.exports[0].description) == (64 * MIB, "first")

    tell(story())
