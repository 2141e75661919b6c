"""A start's opening, which goes on while the rest of the program is imported."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdzram.config import PoolConfig, ServerConfig
from nbdzram.engine.pool import Pool
from nbdzram.errors import ArenaInUse
from nbdzram.server.opening import Opened, Opening, open_everything

BLOCK = 4096


def config(tmp_path: Path) -> ServerConfig:
    return ServerConfig(
        exports=(), state_dir=tmp_path / "state", pools=(PoolConfig(name="default"), PoolConfig(name="other"))
    )


def opened(opening: Opening) -> Opened:
    return asyncio.run(opening.opened())


def close(pools: dict[str, Pool]) -> None:
    for pool in pools.values():
        pool.close()


def test_who_waits_has_the_pools(tmp_path: Path) -> None:
    with Opening(config(tmp_path)) as opening:
        found = opened(opening)
    assert set(found.pools) == {"default", "other"}
    disk = found.pools["default"].create("disk", BLOCK)
    disk.write(0, b"x" * BLOCK)
    assert disk.read(0, 1) == b"x"
    close(found.pools)


def test_what_nobody_waits_for_is_closed(tmp_path: Path) -> None:
    with Opening(config(tmp_path)) as opening:
        pass
    close(open_everything(config(tmp_path)).pools)
    del opening  # until here: pools of which nobody knows any more are closed by themselves


def test_what_goes_wrong_is_told_to_who_waits(tmp_path: Path) -> None:
    served = open_everything(config(tmp_path))
    with pytest.raises(ArenaInUse), Opening(config(tmp_path)) as opening:
        opened(opening)
    close(served.pools)


def test_what_goes_wrong_and_nobody_waits_for_is_nobody_s(tmp_path: Path) -> None:
    """As where the start failed for something else before."""
    (tmp_path / "state").write_bytes(b"")
    with Opening(config(tmp_path)):
        pass
