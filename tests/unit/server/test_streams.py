"""Streams that a service sends and receives: what is left of one when it has ended, however it did."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdzram.errors import UserError
from nbdzram.stream.pipe import Pipe
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.house import House, tell
from tests.unit.server.lasting import spoil

Pass = Callable[[Pipe], Awaitable[object]]


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


async def passed(move: Pass, given: bytes = b"") -> bytes:
    """What comes out of one end of a pipe while a stream has the other, into which this is put."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(Pipe(ours)) as pipe, contextlib.closing(Pipe(theirs)) as other:

        def carry() -> bytes:
            if given:
                other.write(given)
                other.end()
            return b"".join(iter(lambda: other.read(1 << 16), b""))

        carrying = asyncio.create_task(asyncio.to_thread(carry))
        try:
            await move(pipe)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            out = (await asyncio.gather(carrying, return_exceptions=True))[0]
        return out if isinstance(out, bytes) else b""


@pytest.mark.parametrize("resumable", [True, False])
def test_nothing_is_kept_of_a_stream_that_cannot_be_sent_or_offered(tmp_path: Path, *, resumable: bool) -> None:
    """What is kept is for who goes on: rot ends a stream for good, and so does what cannot be remembered here."""
    house = House(tmp_path)

    async def story() -> None:
        async with house.open():
            service, pool = house.service, house.pool()
            pool.disks()[0].write(0, noise(1) + text(2))

            async def send(pipe: Pipe) -> None:
                await service.send_stream(["disk"], None, resumable=resumable, resume=None, pipe=pipe)

            async def receive(pipe: Pipe) -> None:
                await service.receive_stream("copy-", None, resumable=resumable, pipe=pipe)

            stream = await passed(send)
            for told in await service.streams():
                await service.abandon_stream(told.stream)
            before = len(pool.all_disks()), pool.stats().memory_used
            (house.state_dir / "changes.new").mkdir()
            with pytest.raises(UserError, match="cannot remember the change"):
                await passed(receive, stream)
            (house.state_dir / "changes.new").rmdir()
            assert (len(pool.all_disks()), pool.stats().memory_used) == before
            service.changes._accepting = False  # as while it starts
            with pytest.raises(UserError, match="starting or stopping; ask again when it runs"):
                await passed(receive, stream)
            service.changes._accepting = True
            assert (len(pool.all_disks()), pool.stats().memory_used) == before
            spoil(house.state_dir / "default.pool", lambda arena: arena.object_of(1) + BLOCK // 2)
            with pytest.raises(UserError, match="is not what was written"):
                await passed(send)
            assert (len(pool.all_disks()), await service.streams()) == (before[0], ())
            pool.disks()[0].write(0, noise(1))

    tell(story())
