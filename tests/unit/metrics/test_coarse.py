"""What strangers read of a pool: whether somebody else has a block does not show."""

from __future__ import annotations

import dataclasses

from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.stats import PoolStats
from nbdzram.metrics.coarse import BYTES, COUNTS, OBJECTS, SIZES, for_strangers, usage_for_strangers
from nbdzram.metrics.exposition import Family
from nbdzram.metrics.families import FAMILIES
from tests.unit.engine.blocks import BLOCK, half_random, noise, run
from tests.unit.records import SERVER

SECRET = noise(12345)


def told(pool: Pool, *, tells_sharing: bool = False) -> list[str]:
    """Every line of the metrics that speaks of the pool."""
    status = dataclasses.replace(SERVER.pools[0], stats=pool.stats(), tells_sharing=tells_sharing)
    server = for_strangers(dataclasses.replace(SERVER, pools=(status,)))
    return [line for family in FAMILIES if isinstance(family, Family) for line in family.lines(server)]


def house(*, others_have_it: bool, inline: bool) -> Pool:
    """A pool of two tenants, of whom the second has just written the secret; a fold has run."""
    pool = Pool(inline_dedup=inline)
    other = pool.create("other", 64 << 20)
    for number in range(1000):
        other.write(number * BLOCK, (half_random, noise)[number % 2](number))
    other.write(1000 * BLOCK, SECRET if others_have_it else noise(54321))
    pool.create("curious", 64 << 20).write(0, SECRET)
    run(Fold(pool))
    return pool


def test_a_block_that_somebody_else_has_does_not_show_in_the_metrics() -> None:
    for inline in (False, True):
        known, unknown = (house(others_have_it=had, inline=inline) for had in (True, False))
        assert known.stats().objects == unknown.stats().objects - 1
        assert told(known) == told(unknown)
        assert told(known, tells_sharing=True) != told(unknown, tells_sharing=True)


def test_every_counter_that_depends_on_equal_content_is_coarse() -> None:
    """A new counter is looked at by whoever adds it: it stands in one of the tables, or here."""
    independent = {"orig_data_size", "mem_limit", "same_pages", "failed_writes", "blocks_rotten", "compr_by_codec"}
    assert {field.name for field in dataclasses.fields(PoolStats)} == {*SIZES, *COUNTS} | independent
    stranger = dataclasses.replace(SERVER.pools[0], tells_sharing=False)
    stats = for_strangers(dataclasses.replace(SERVER, pools=(stranger,))).pools[0].stats
    assert all(getattr(stats, name) % BYTES == 0 for name in SIZES)
    assert all(getattr(stats, name) % OBJECTS == 0 for name in COUNTS)
    assert all(size % BYTES == 0 for size in stats.compr_by_codec.values())


def test_what_an_export_has_alone_is_coarse() -> None:
    with house(others_have_it=True, inline=False) as pool:
        usage = usage_for_strangers({disk.name: disk.usage() for disk in pool.disks()})
    assert usage["curious"].unique == usage["curious"].compressed == 0
    assert usage["other"].compressed % BYTES == usage["other"].unique % BYTES == usage["other"].shared % BYTES == 0
