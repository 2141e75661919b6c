"""What strangers read of a pool: whether somebody else has a block does not show."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator

from nbdzram.config import Trigger
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.stats import BLOCK_SIZE, PoolStats
from nbdzram.metrics.answers import Answers
from nbdzram.metrics.coarse import BYTES, COUNTS, OBJECTS, SIZES, for_strangers, usage_for_strangers
from nbdzram.metrics.exposition import Family
from nbdzram.metrics.families import FAMILIES
from nbdzram.server.policy import Policy, Reason, compact_gain, fold_gain, recompress_gain
from nbdzram.status import PoolStatus
from tests.unit.engine.blocks import BLOCK, half_random, noise, run
from tests.unit.metrics.stage import Show
from tests.unit.records import POOL_STATS, SERVER, TWO_OF_EACH

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


UNEQUAL = """
    version pid started_at uptime_seconds draining connections connections_total handshake_failures protocol_errors uris
    connections_limit tls_files_usable certificate_expires_at state_dir_size_bytes event_loop_lag_seconds threads
    latency_bounds_seconds exports starting
    pools.name pools.path pools.dedup pools.tells_sharing pools.verify pools.stats
    pools.scrub.blocks pools.scrub.rotten_objects pools.scrub.rotten_blocks pools.scrub.finished_at
    pools.maintenance.running pools.maintenance.decisions pools.maintenance.next_allowed_seconds
    pools.maintenance.totals pools.maintenance.recent
    pools.maintenance.queue.number pools.maintenance.queue.kind pools.maintenance.queue.pool
    pools.maintenance.queue.state pools.maintenance.queue.reason pools.maintenance.queue.dry_run
    pools.maintenance.queue.cpu_percent pools.maintenance.queue.asked_at pools.maintenance.queue.started_at
    pools.maintenance.queue.finished_at pools.maintenance.queue.seconds pools.maintenance.queue.seconds_left
    pools.maintenance.queue.result pools.maintenance.queue.error
    checkpoint.moment checkpoint.interval_seconds checkpoint.seconds checkpoint.failures checkpoint.written_share
    checkpoint.held_back
    journal.pools journal.usable journal.trouble journal.groups journal.seconds journal.failures journal.held_back
    headroom.whose headroom.limit_bytes headroom.reserve_bytes headroom.short headroom.shortages
"""
"""Of a server's status, what does not depend on which content is equal; or what the other tests here are about."""


def figures(record: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Each field that is no record, by its path, of all records that are told to strangers."""
    if isinstance(record, tuple) and record and dataclasses.is_dataclass(record[0]) and path not in UNEQUAL.split():
        for one in record:
            if not (isinstance(one, PoolStatus) and one.tells_sharing):
                yield from figures(one, path)
    elif path in UNEQUAL.split() or not dataclasses.is_dataclass(record):
        yield path, record
    else:
        for field in dataclasses.fields(record):
            yield from figures(getattr(record, field.name), f"{path}.{field.name}".lstrip("."))


def test_whatever_else_a_server_tells_is_looked_at_or_coarse() -> None:
    """A new field is looked at by whoever adds it: it is coarse, or stands above."""
    assert TWO_OF_EACH.checkpoint is not None
    assert TWO_OF_EACH.journal is not None
    assert TWO_OF_EACH.headroom is not None
    exact = dataclasses.replace(
        TWO_OF_EACH,
        state_dir_free_bytes=BYTES + 1,
        checkpoint=dataclasses.replace(TWO_OF_EACH.checkpoint, stream_bytes=BYTES + 1),
        journal=dataclasses.replace(TWO_OF_EACH.journal, group_bytes=BYTES + 1, segment_bytes=BYTES + 1),
        headroom=dataclasses.replace(TWO_OF_EACH.headroom, free_bytes=BYTES + 1),
    )
    told = list(figures(for_strangers(exact)))
    assert set(UNEQUAL.split()) <= {path for path, _ in told}, "a field that is no more"
    for path, value in told:
        if path not in UNEQUAL.split():
            assert isinstance(value, int), path
            assert value % (BYTES if "bytes" in path else OBJECTS) == 0, path


def test_a_server_whose_pools_all_tell_sharing_tells_exactly() -> None:
    open_ones = tuple(dataclasses.replace(pool, tells_sharing=True) for pool in TWO_OF_EACH.pools)
    status = dataclasses.replace(TWO_OF_EACH, pools=open_ones)
    assert for_strangers(status) == status


def test_the_memory_of_the_process_and_its_history_are_coarse() -> None:
    async def told() -> dict[str, str]:
        answers = Answers(Show())
        return {
            path: (await answers.answer(path)).body.decode() for path in ("/metrics", "/status.json", "/history.json")
        }

    texts = asyncio.run(told())
    (resident,) = re.findall(r"^process_resident_memory_bytes (\S+)$", texts["/metrics"], re.MULTILINE)
    sizes = [float(resident), json.loads(texts["/status.json"])["resident_bytes"]]
    sizes += [sample["memory_bytes"] for sample in json.loads(texts["/history.json"])]
    assert all(sizes)
    assert [size % BYTES for size in sizes] == [0, 0, 0]


def test_a_run_is_not_decided_by_a_single_block() -> None:
    """The reasons are told to strangers: with a block that is equal to another they would be others."""
    for kind in (fold_gain, compact_gain, recompress_gain):
        policy = Policy.new(Trigger.AUTO, 0, kind, now=0.0)
        stats = dataclasses.replace(
            POOL_STATS, mem_used_total=0, compr_data_size=BLOCK_SIZE, objects=1, fold_pending=0, recompress_untried=0
        )
        curious = dataclasses.replace(
            stats, fold_pending=15, mem_used_total=16 * BLOCK_SIZE, recompress_untried=5 * 15 * BLOCK_SIZE
        )
        assert policy.decide(1.0, stats, 0) is policy.decide(1.0, curious, 0) is Reason.NOTHING_NEW


def test_what_an_export_has_alone_is_coarse() -> None:
    with house(others_have_it=True, inline=False) as pool:
        usage = usage_for_strangers({disk.name: disk.usage() for disk in pool.disks()})
    assert usage["curious"].unique == usage["curious"].compressed == usage["curious"].huge == 0
    assert usage["other"].compressed % BYTES == usage["other"].unique % BYTES == usage["other"].shared % BYTES == 0
