"""A pool that serves: what it tells the operator."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest

from nbdzram.config import MaintenanceConfig, Trigger
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.purse import Purse
from nbdzram.errors import EngineError, PoolFull
from nbdzram.server.pools import REFUSALS_SECONDS, ROT_SECONDS, PoolService, automatic_options
from nbdzram.status import RunOptions
from tests.support.arena import Arena

LIMIT = 1 << 20


def overfill(disk: Disk, writes: int) -> None:
    """More random blocks than fit, so that `writes` of them are refused."""
    chance, refused, block = random.Random(1), 0, 0
    while refused < writes:
        try:
            disk.write(block * 4096, chance.randbytes(4096))
        except PoolFull:
            refused += 1
        block += 1


def test_a_full_pool_is_told_once_a_minute_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with Pool(mem_limit=LIMIT) as pool:
        disk = pool.create("disk", 1 << 30)
        service = PoolService("small", pool, MaintenanceConfig(), now=0.0)
        service.tell_refusals(1.0)
        assert caplog.messages == []
        overfill(disk, writes=3)
        service.tell_refusals(2.0)
        (told,) = caplog.messages
        assert told.startswith("the pool small refused 3 writes for lack of room: it uses 960K, its limit is 1M;")
        assert told.endswith("nbdzram pools limit small SIZE")
        overfill(disk, writes=2)
        service.tell_refusals(3.0)
        assert len(caplog.messages) == 1
        service.tell_refusals(2.0 + REFUSALS_SECONDS)
        assert "refused 2 writes" in caplog.messages[1]
        service.tell_refusals(3.0 + 2 * REFUSALS_SECONDS)
        assert len(caplog.messages) == 2


def test_a_pool_that_the_memory_left_bounds_is_told_with_what_all_may_take(caplog: pytest.LogCaptureFixture) -> None:
    purse = Purse()
    with Pool() as pool:
        pool.share(purse)
        purse.ceiling = purse.used + LIMIT
        service = PoolService("one", pool, MaintenanceConfig(), now=0.0)
        overfill(pool.create("disk", 1 << 30), writes=3)
        service.tell_refusals(1.0)
        assert ", and memory is short: all pools may take " in caplog.text
        assert "limit is" not in caplog.text
        assert "pools limit" not in caplog.text
        purse.ceiling = purse.used + 2 * LIMIT  # somebody gave it more since
        pool.mem_limit = 1
        overfill(pool.create("other", 1 << 30), writes=1)
        service.tell_refusals(1.0 + REFUSALS_SECONDS)
        assert "memory is short" not in caplog.messages[1]


def test_what_was_decided_stays_counted_when_a_trigger_becomes_another() -> None:
    with Pool() as pool:
        service = PoolService("one", pool, MaintenanceConfig(fold=Trigger.AUTO, compact=Trigger.AUTO), now=0.0)
        for kind in ("fold", "compact"):
            service.policies[kind].decide(1.0, pool.stats(), 0)
        service.adopt(MaintenanceConfig(fold=Trigger.INTERVAL, fold_interval_seconds=60.0, compact=Trigger.AUTO), 2.0)
        service.policies["fold"].decide(3.0, pool.stats(), 0)
        decided = service.status(3.0).maintenance.decisions
        assert (decided["fold"], decided["compact"]) == ({"nothing_new": 1, "not_due": 1}, {"nothing_new": 1})


def test_a_recompression_by_itself_goes_as_the_configuration_says() -> None:
    said = MaintenanceConfig(
        recompress_level=7, recompress_age_seconds=60, recompress_huge_only=True, recompress_dictionary=True
    )
    wanted = RunOptions(level=7, idle_seconds=60, huge_only=True, dictionary=True)
    assert automatic_options("recompress", said) == wanted
    assert automatic_options("fold", said) == automatic_options("compact", said) == RunOptions()


def test_rot_is_told_once_a_minute_with_the_block_that_it_was_last_seen_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool, path.open("r+b") as file:
        disk = pool.create("disk", 1 << 20)
        disk.write(5 * 4096, random.Random(1).randbytes(4096))
        service = PoolService("aged", pool, MaintenanceConfig(), now=0.0)
        service.tell_rot(1.0)
        assert caplog.messages == []
        with mmap.mmap(file.fileno(), 0) as view:
            view[Arena(view).object_of(1)] ^= 1
        for _ in range(3):
            with pytest.raises(EngineError):
                disk.read(5 * 4096, 4096)
        service.tell_rot(2.0)
        (told,) = caplog.messages
        assert told.startswith("the pool aged found 3 times that a stored block is not what was written")
        assert "last block 5 of export 'disk'" in told
        with pytest.raises(EngineError):
            disk.read(5 * 4096, 4096)
        service.tell_rot(3.0)
        assert len(caplog.messages) == 1
        service.tell_rot(2.0 + ROT_SECONDS)
        assert "found 1 time that" in caplog.messages[1]
