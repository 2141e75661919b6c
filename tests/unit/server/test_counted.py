"""What is counted of a server's work is what was done: requests, their time, blocks given back, processor time."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from nbdzram.nbd.constants import Command
from nbdzram.nbd.verdicts import Verdict
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS, ExportCount, OperationCount
from nbdzram.server.handover import Handover
from nbdzram.server.maintenance import Maintenance
from nbdzram.server.service import Service
from nbdzram.server.traffic import Traffic
from nbdzram.status import RunOptions
from tests.support.nbd_client import Client
from tests.unit.server.conftest import Play, Stage
from tests.unit.server.test_maintenance import CountingPool, ScriptedRun
from tests.unit.server.test_nothing_is_left import everything
from tests.wire import CMD_READ, EINVAL

BLOCK = bytes(range(256)) * 16
TRIM = 4


def test_what_another_process_counted_is_counted_on_each_in_its_place() -> None:
    """And told as zram tells it: what failed by whether it looks or changes, and what was wrong by itself."""
    first = itertools.count(2)
    given = ExportCount(
        {
            str(command): OperationCount(
                requests=next(first),
                size=next(first),
                nanoseconds=next(first) * 10**9,
                errors=tuple(next(first) for _ in Verdict),
                latency=tuple(next(first) for _ in range(len(LATENCY_BOUNDS_SECONDS) + 1)),
            )
            for command in (*(command for command in Command if command is not Command.DISC), max(Command) + 1)
        },
        blocks_trimmed=next(first),
        throttled_requests=next(first),
        throttled_nanoseconds=next(first),
    )
    traffic = Traffic()
    traffic.go_on_from(replace(given, operations={**given.operations, "99": given.operations["0"]}))
    assert traffic.counted() == given
    operations, (failed_reads, failed_writes, invalid, trimmed) = traffic.told()
    assert (trimmed, traffic.throttled()) == (
        given.blocks_trimmed,
        (given.throttled_requests, given.throttled_nanoseconds),
    )
    read = operations["read"]
    assert (read.requests, read.bytes, read.latency_sum_seconds) == (2, 3, 4.0)
    assert read.errors == {verdict.name.lower(): 5 + verdict for verdict in Verdict}

    def failed(command: str, *, itself: bool) -> int:
        return sum(
            count
            for verdict, count in zip(Verdict, given.operations[command].errors, strict=True)
            if verdict.invalid_io is itself
        )

    looks = {str(int(command)) for command in (Command.READ, Command.BLOCK_STATUS)}
    assert failed_reads == sum(failed(command, itself=False) for command in looks)
    assert failed_writes == sum(failed(command, itself=False) for command in given.operations.keys() - looks)
    assert invalid == sum(failed(command, itself=True) for command in given.operations)


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


def test_what_two_threads_did_for_one_export_is_counted_together(play: Play, stage: Stage) -> None:
    """Whichever of them did most of it: the first for `disk`, the second for `frozen`."""
    stage.config = replace(stage.config, threads=2)

    async def story(stage: Stage) -> None:
        clients = [await stage.client(name) for name in (b"disk", b"disk", b"frozen", b"frozen")]
        assert [thread.clients for thread in stage.server.threads()] == [2, 2]
        most, few = 12, 3
        for client, count in zip(clients, (most, few, few, most), strict=True):
            for _ in range(count):
                await client.read(0, (1 << 20) if count == most else 512)
                assert (await client.call(99, 0, 0)).error == EINVAL
        for export in (stage.disk, stage.frozen):
            while sum((told := export.traffic.operations()["read"]).latency_counts) < most + few:  # noqa: ASYNC110
                await asyncio.sleep(0)  # as above
            assert (told.requests, told.bytes) == (most + few, (most << 20) + few * 512)
            least = sum(
                low * count for low, count in zip((0.0, *LATENCY_BOUNDS_SECONDS), told.latency_counts, strict=False)
            )
            assert told.latency_sum_seconds >= least
            assert export.traffic.io_stat().invalid_io == most + few
        for client in clients:
            await client.close()

    play(story)


def test_refused_requests_that_came_faster_than_the_log_is_written_are_counted(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    """As many are kept as there are places (sessions/notices.pxd), and of one client ten (sessions/answers.pxd)."""
    kept, of_each, clients = 256, 10, 30

    async def story(stage: Stage) -> None:
        for _ in range(2):
            attached = [await asyncio.to_thread(Client, Path(stage.path), "disk") for _ in range(clients)]
            for client in attached:
                for _ in range(of_each + 1):  # while nothing else runs here
                    client.send(CMD_READ, stage.disk.size_bytes, 512)
            for client in attached:
                assert {client.reply()[0] for _ in range(of_each + 1)} == {EINVAL}
            for client in attached:
                await asyncio.to_thread(client.close)

    with caplog.at_level(logging.DEBUG, logger="nbdzram"):
        play(story)
    told = [record.getMessage() for record in caplog.records]
    lost = [line.split()[0] for line in told if "are not in the log" in line]
    assert lost == [str(clients * of_each - kept)] * 2
    assert sum("past the end of the export" in line for line in told) == 2 * kept


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


def test_no_two_runs_of_a_server_have_one_number_whichever_process_does_them(tmp_path: Path) -> None:
    """By it an operator says which one is meant, and looks it up in the log."""
    config = everything(tmp_path, journal=False)

    async def numbers(service: Service, folds: int) -> list[int]:
        for _ in range(folds):
            await service.run("fold", RunOptions(), pool=None, cpu_percent=100, progress=lambda *_: None)
        return [run.number for run in await service.runs()]

    async def story() -> list[int]:
        handed, seen = Handover(), list[int]()
        for folds in (2, 0, 1, 0, 2):
            service = Service(config, handed=handed)
            await service.start(listen=False)
            await service.listen()
            seen += await numbers(service, folds)
            service._nbd.prepare_to_hand_over()
            handed = await service.hand_over()
        service = Service(config, handed=handed)
        await service.start(listen=False)
        await service.listen()
        await service.stop()
        return seen

    seen = uvloop.run(story())
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 5 * len(config.pools)
