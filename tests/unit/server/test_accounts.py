"""What is charged comes back, what is counted is right, and what is limited ends: budgets, inboxes, counters."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from pathlib import Path

from nbdzram.config import Limits, TlsConfig, TlsMode
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS
from nbdzram.server.hosting import Hosting
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.unit.server.conftest import Play, Stage
from tests.wire import CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, OPT_STARTTLS, REP_ACK, request

BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
TLS_BYTES = 44 * KIB  # charged for a client under TLS


def hosting_of(stage: Stage) -> Hosting:
    assert stage.server._hosting is not None
    return stage.server._hosting


async def quiet(stage: Stage, used: int = 0) -> None:
    """Until the budget holds exactly `used` bytes again."""
    async with asyncio.timeout(30):
        while hosting_of(stage).plane.budget.used != used:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


def test_writes_that_overlap_give_their_whole_budget_back(play: Play) -> None:
    """Of one connection several payloads at a time, up to its limit, over the same blocks; and again afterwards."""

    async def story(stage: Stage) -> None:
        client = await stage.client()
        for turn in range(3):
            for cookie in range(12):
                payload = bytes([turn * 12 + cookie + 1]) * (600 * KIB)
                client.ask(CMD_WRITE, cookie * 4 * KIB, len(payload), cookie=cookie, payload=payload)
            async with asyncio.timeout(30):
                answers = [await client.answer() for _ in range(12)]
            assert sorted(cookie for cookie, _ in answers) == list(range(12))
            assert not any(answer.error for _, answer in answers)
            (session,) = stage.server.sessions
            assert not session.busy
        for _ in range(2):
            hosting_of(stage).plane.rest()
            await client.read(0, 512)  # its thread has rested
        await quiet(stage)
        await client.close()

    play(story, Limits(connection_bytes=MIB, total_bytes=8 * MIB))


def test_tls_clients_that_left_are_charged_for_nothing(play: Play, stage: Stage, tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    certificate, key = pki.issue("localhost", file="server")
    stage.config = replace(stage.config, tls=TlsConfig(mode=TlsMode.ON, certificate=certificate, key=key))
    context = pki.client_context()

    async def attach(stage: Stage, context: ssl.SSLContext) -> WireClient:
        client = await WireClient.connect(stage.path)
        assert (await client.option(OPT_STARTTLS))[-1].kind == REP_ACK
        await client.writer.start_tls(context, server_hostname="localhost")
        return await client.go()

    async def story(stage: Stage) -> None:
        clients = [await attach(stage, context) for _ in range(3)]
        for client in clients:
            assert await client.read(0, 512) == bytes(512)
        assert hosting_of(stage).plane.budget.used == 3 * TLS_BYTES
        for left in (2, 1, 0):
            await clients.pop().close()
            await quiet(stage, left * TLS_BYTES)

    play(story)


def test_blocks_given_back_by_trim_are_counted_and_no_others(play: Play) -> None:
    """zram's notify_free: of small requests and of large ones; zeroing gives nothing back by the client's wish."""

    async def story(stage: Stage) -> None:
        client = await stage.client()
        for length in (8 * BLOCK, 2 * MIB):
            assert (await client.call(CMD_TRIM, 0, length)).error == 0
            assert (await client.call(CMD_WRITE_ZEROES, 0, length)).error == 0
        assert stage.disk.traffic.io_stat().notify_free == 8 + 2 * MIB // BLOCK
        await client.close()

    play(story)


def test_the_sum_of_durations_is_that_of_the_requests_counted(play: Play) -> None:
    """It lies between what the buckets' lower and upper bounds allow, for requests that left one by one or together."""

    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.send(b"".join(request(CMD_READ, 0, 4096, cookie=cookie) for cookie in range(200)))
        for _ in range(200):
            await client.answer(read_length=4096)
        for _ in range(20):
            await client.write(0, b"w" * BLOCK)
            await client.read(0, MIB)
            await client.call(CMD_TRIM, 0, 2 * MIB)
        assert (await client.call(CMD_READ, 1 << 60, 1)).error
        for name, count in (("read", 221), ("write", 20), ("trim", 20)):
            counted = stage.disk.traffic.operations()[name]
            assert counted.requests == sum(counted.latency_counts) == count
            bounds = (0.0, *LATENCY_BOUNDS_SECONDS)
            least = sum(many * bound for many, bound in zip(counted.latency_counts, bounds, strict=True))
            most = sum(many * bound for many, bound in zip(counted.latency_counts, bounds[1:], strict=False))
            assert least <= counted.latency_sum_seconds <= most
            assert counted.latency_sum_seconds > 0
        await client.close()

    play(story)
