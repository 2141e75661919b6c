"""Streams that a service sends: what is left of one when it has ended."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from nbdzram.stream.pipe import Pipe
from tests.unit.server.house import House, tell


def drain(connection: socket.socket) -> int:
    pipe, size = Pipe(connection), 0
    while part := pipe.read(1 << 16):
        size += len(part)
    pipe.close()
    return size


def test_nothing_watches_for_a_stream_that_has_ended(tmp_path: Path) -> None:
    """It would cancel, for want of room, whatever uses the descriptors then that the stream had."""
    house = House(tmp_path)

    async def story() -> None:
        async with house.open():
            before = asyncio.all_tasks()
            for _ in range(3):
                ours, theirs = socket.socketpair()
                reading = asyncio.create_task(asyncio.to_thread(drain, theirs))
                pipe = Pipe(ours)
                report = await house.service.send_stream(["disk"], None, resumable=False, resume=None, pipe=pipe)
                assert report.stream_bytes == await reading
                pipe.close()
                assert asyncio.all_tasks() == before

    tell(story())
