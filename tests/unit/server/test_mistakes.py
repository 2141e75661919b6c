"""A mistake of ours, met while one client is served, ends that connection, is loud, and costs nobody else a thing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from nbdzram.nbd.verdicts import Asked
from nbdzram.server.session import Session
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import SIZE, Play, Stage
from tests.wire import CMD_READ, CMD_WRITE, request

KIB = 1 << 10
SECRET = b"\xee" * (64 * KIB)
OF_A_WAKE_UP = 256  # READs of a block: WAKE_ALLOWANCE
LARGE = 128 * KIB  # for the workers
NOISE = random.Random(1).randbytes(2 << 20)  # more than the pool takes


class Blunder(AssertionError):
    """What our mistake raises."""


@pytest.fixture
def blundering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused meets a mistake of ours."""

    def explain(self: Session, verdict: int, asked: Asked, failed_at: int | None) -> bytes:
        raise Blunder(f"{verdict} {asked} {failed_at} {self.peer.text}")

    monkeypatch.setattr(Session, "explain_failure", explain)


def hear() -> list[BaseException]:
    """What the loop's exception handler is told from now on."""
    heard: list[BaseException] = []

    def handler(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        heard.append(context["exception"])

    asyncio.get_running_loop().set_exception_handler(handler)
    return heard


async def hang_up(victim: WireClient) -> None:
    """It was cut already."""
    with contextlib.suppress(OSError):
        await victim.close()


@pytest.mark.usefixtures("blundering")
def test_a_mistake_leaves_nothing_in_the_scratch_for_the_next_client(play: Play) -> None:
    """Answers that were put together stay unsent, and no other client's answers are sent in their place."""

    async def story(stage: Stage) -> None:
        heard = hear()
        victim = await stage.client(b"frozen")
        other = await stage.client()
        await other.write(0, SECRET)
        asked = b"".join(request(CMD_READ, 0, 4096, cookie=cookie) for cookie in range(OF_A_WAKE_UP + 40))
        victim.send(asked + request(CMD_READ, SIZE, 1))
        received = asyncio.ensure_future(victim.reader.read())  # to the end: the connection must be closed
        while not heard:
            assert await other.read(0, len(SECRET)) == SECRET
        assert SECRET[:64] not in await asyncio.wait_for(received, 30)
        assert [type(error) for error in heard] == [Blunder]
        await other.close()
        await hang_up(victim)

    play(story)


@pytest.mark.usefixtures("blundering")
def test_a_mistake_with_one_clients_task_loses_nobody_elses(play: Play) -> None:
    """Tasks of several connections that are done come back together; each is answered, whatever happens to one."""

    async def story(stage: Stage) -> None:
        heard = hear()
        assert stage.server._hosting is not None
        workers = stage.server._hosting.workers
        loop = asyncio.get_running_loop()
        stage.pool.mem_limit = 1 << 20
        other = await stage.client()
        for number in range(20):
            victim = await stage.client()
            before = stage.disk.disk.read(0, LARGE)
            loop.remove_reader(workers.fileno())
            victim.ask(CMD_WRITE, 4 << 20, len(NOISE), payload=NOISE)
            other.ask(CMD_WRITE, 0, LARGE, cookie=number, payload=bytes([number + 1]) * LARGE)
            while stage.disk.disk.read(0, LARGE) == before:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            loop.add_reader(workers.fileno(), workers.collect)
            assert (await asyncio.wait_for(other.answer(), 30))[0] == number
            assert await victim.reader.read() == b""
            await hang_up(victim)
        assert {type(error) for error in heard} == {Blunder}
        await other.close()

    play(story)
