"""A client that haggles and does not read its replies: no more are made for it, and all of them come once it reads."""

from __future__ import annotations

import asyncio

from nbdzram.config import EVERYONE
from nbdzram.server.connection import Connection
from nbdzram.server.exports import Export
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import Play, Stage
from tests.wire import OPT_GO, OPT_LIST, OPTION_REPLY, name_and_infos, option

COUNT = 300
LIST_BYTES = COUNT * 4096


def crowd(stage: Stage) -> None:
    """So many exports that a socket does not hold the list of them."""
    for number in range(COUNT):
        disk = stage.pool.create(f"disk{number}", 1 << 20)
        stage.exports.add(
            Export(
                name=disk.name,
                disk=disk,
                pool_name="default",
                access=EVERYONE,
                read_only=False,
                description="d" * 4096,
            )
        )


async def unread(stage: Stage) -> int:
    """How much the server has made of what is not read; once it makes nothing more."""
    assert stage.server._hosting is not None
    (connection,) = stage.server._hosting.haggling
    assert isinstance(connection, Connection)
    told = -1
    while (now := connection._handshake._told) != told or not connection._paused:
        told = now
        await asyncio.sleep(0.01)
    assert connection._transport.get_write_buffer_size() < 2 * 32 * 1024 + 4096
    return told


def test_a_list_that_is_not_read_waits_and_comes_whole(stage: Stage, play: Play) -> None:
    """And what was asked behind it comes behind it, in one piece with the answers of the disk."""

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        client.send(option(OPT_LIST) + option(OPT_GO, name_and_infos(b"disk")))
        async with asyncio.timeout(30):
            assert await unread(stage) < COUNT
        told: list[tuple[int, int]] = []
        while not told or told[-1] != (OPT_GO, 1):
            _, number, kind, size = OPTION_REPLY.unpack(await client.reader.readexactly(OPTION_REPLY.size))
            await client.reader.readexactly(size)
            told.append((number, kind))
        assert told == [(OPT_LIST, 2)] * (COUNT + 2) + [(OPT_LIST, 1), (OPT_GO, 3), (OPT_GO, 1)]
        assert await client.read(0, 4096) == bytes(4096)
        await client.close()

    crowd(stage)
    play(story)
