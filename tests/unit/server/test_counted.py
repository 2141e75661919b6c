"""What is counted of a server's work is what was done: requests, their time, blocks given back, processor time."""

from __future__ import annotations

import asyncio

import pytest

from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS
from nbdzram.server.maintenance import Maintenance
from tests.unit.server.conftest import Play, Stage
from tests.unit.server.test_maintenance import CountingPool, ScriptedRun

BLOCK = bytes(range(256)) * 16
TRIM = 4


def test_blocks_that_clients_give_back_are_counted_whole_and_once(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        await client.write(0, BLOCK * 16)
        assert (await client.call(TRIM, 4096, 5 * 4096)).error == 0
        assert stage.disk.traffic.io_stat().notify_free == 5
        assert (await client.call(TRIM, 0, 64 << 20)).error == 0  # a large one goes to a worker
        assert stage.disk.traffic.io_stat().notify_free == 5 + (64 << 20) // 4096
        await client.close()

    play(story)


def test_the_time_of_requests_lies_where_their_buckets_do(play: Play) -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        for _ in range(20):
            await client.write(0, BLOCK)
            await client.read(0, 4096)
        for name in ("read", "write"):
            while sum((told := stage.disk.traffic.operations()[name]).latency_counts) < 20:  # noqa: ASYNC110
                await asyncio.sleep(0)  # the time of the last one is counted behind its answer, when its turn is over
            assert told.requests == sum(told.latency_counts) == 20
            bounds = (0.0, *LATENCY_BOUNDS_SECONDS)
            least = sum(bounds[index] * count for index, count in enumerate(told.latency_counts))
            most = sum(bound * count for bound, count in zip(LATENCY_BOUNDS_SECONDS, told.latency_counts, strict=False))
            assert least <= told.latency_sum_seconds <= most
        await client.close()

    play(story)


def test_runs_count_the_processor_time_that_they_took_and_no_pause() -> None:
    """At a fifth of a core a run sleeps four times as long as it works."""

    async def act() -> None:
        maintenance = Maintenance("default", CountingPool(), {"fold": lambda _: ScriptedRun(500, burn)})
        reports = [await maintenance.run("fold", cpu_percent=percent) for percent in (100, 20)]
        await maintenance.stop()
        totals = maintenance.totals["fold"]
        assert totals.runs == 2
        assert totals.cpu_seconds == pytest.approx(sum(report.cpu_seconds for report in reports))
        assert totals.seconds == pytest.approx(sum(report.seconds for report in reports))
        assert all(0 < report.cpu_seconds <= report.seconds for report in reports)
        assert reports[1].cpu_seconds < reports[1].seconds / 2

    asyncio.run(act())


def burn() -> None:
    sum(range(200_000))
