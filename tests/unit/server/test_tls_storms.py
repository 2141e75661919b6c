"""Clients under TLS that are cut, by themselves or by the server, wherever they are: they take nothing with them."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from pathlib import Path

import pytest

from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.support.tls_client import GO_DISK, GO_REPLIES, ByHand, attach, leave
from tests.unit.server.conftest import Play, Secure, Stage
from tests.wire import CMD_READ, CMD_WRITE, OPT_STARTTLS, option, request

KIB, MIB = 1 << 10, 1 << 20
WAVES, CROWD = 8, 12
SEEDS = [int(os.environ["NBDZRAM_SEED"])] if "NBDZRAM_SEED" in os.environ else [1, 2, 3]

STAGES = ("STARTTLS", "half a hello", "a hello", "TLS", "GO", "attached", "half a write", "reads", "half a record")
ENDS = ("close", "end of file", "reset", "garbage", "abort", "drain", "stay")


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_is_lost_and_nothing_is_kept_when_clients_are_cut_at_every_stage(
    play: Play, secure: Secure, pki: Pki, seed: int
) -> None:
    """To try one again: NBDZRAM_SEED=n pytest tests/unit/server/test_tls_storms.py."""
    secure()
    dice = random.Random(seed)

    async def story(stage: Stage) -> None:
        trust = pki.client_context()
        witness = await attach(stage.path, trust)
        await witness.write(0, b"w" * MIB)
        before = descriptors()
        charged = charged_bytes(stage)
        for _ in range(WAVES):
            crowd = [
                (dice.choice(STAGES), dice.choice(ENDS), await WireClient.connect(stage.path)) for _ in range(CROWD)
            ]
            clients = await asyncio.gather(*(come(client, trust, point) for point, _, client in crowd))
            for client, (_, end, _) in zip(clients, crowd, strict=True):
                go(stage, client, end, dice)
            assert await witness.read(0, MIB) == b"w" * MIB
            for client in clients:
                await leave(client.client)
            while stage.server.connections > 1:  # noqa: ASYNC110 - whatever it takes
                await asyncio.sleep(0.001)
            assert charged_bytes(stage) == charged
        assert await witness.read(0, MIB) == b"w" * MIB
        assert descriptors() <= before
        await leave(witness)

    play(story)


async def come(client: WireClient, trust: ssl.SSLContext, point: str) -> ByHand:
    """As far as `point`."""
    hand = ByHand(client, trust)
    client.send(option(OPT_STARTTLS))
    await client.reader.readexactly(20)
    if point == "STARTTLS":
        return hand
    if "hello" in point:
        with pytest.raises(ssl.SSLWantReadError):
            hand.tls.do_handshake()
        hello = hand.outgoing.read()
        client.send(hello[: len(hello) // 2] if point == "half a hello" else hello)
        return hand
    await hand.handshake()
    if point == "TLS":
        return hand
    client.send(hand.encrypt(GO_DISK))
    if point == "GO":
        return hand
    assert len(await hand.read(GO_REPLIES)) == GO_REPLIES
    if point == "half a write":
        client.send(hand.encrypt(request(CMD_WRITE, 8 * MIB, MIB) + bytes(MIB // 2)))
    elif point == "reads":
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(hand.encrypt(request(CMD_READ, 0, MIB) * 20))
    elif point == "half a record":
        client.send(hand.encrypt(bytes(16 * KIB))[:-100])
    return hand


def go(stage: Stage, hand: ByHand, end: str, dice: random.Random) -> None:
    """End it, or let the server do so."""
    writer = hand.client.writer
    if end == "close":
        writer.close()
    elif end == "end of file":
        writer.write_eof()
    elif end == "reset":
        writer.transport.abort()
    elif end == "garbage":
        hand.client.send(dice.randbytes(500))
    elif end in {"abort", "drain"}:
        for attached in stage.server.sessions[1:]:  # the first is the witness
            if dice.random() < 0.5:
                getattr(attached, end)()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def charged_bytes(stage: Stage) -> int:
    hosting = stage.server._hosting
    assert hosting is not None
    return hosting.plane.budget.used
