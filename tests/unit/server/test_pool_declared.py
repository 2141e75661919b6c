"""What a pool is where it is declared, was changed at run time, and is declared otherwise since: value by value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nbdzram.config import Dedup, PoolConfig
from nbdzram.server.opening import declared_as, effective_pool, open_pools
from nbdzram.server.state import PoolChange, State

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
