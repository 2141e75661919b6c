"""Streams that a service sends and receives: what is left of one when it has ended, however it did."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdzram.config import ExportConfig, PoolConfig, ServerConfig
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import method_table
from nbdzram.control.server import ControlServer
from nbdzram.errors import PoolFull, StreamError, UserError
from nbdzram.server import streams
from nbdzram.server.handover import Handover
from nbdzram.server.pool_changes import STARTS
from nbdzram.server.service import Service
from nbdzram.stream.layout import read_header
from nbdzram.stream.pipe import Pipe
from nbdzram.stream.reading import Counted, records
from tests.unit.engine.blocks import BLOCK, noise, text
from tests.unit.server.house import GATE_SECONDS, MIB, House, tell, until
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


def test_a_stream_says_when_its_moment_was(tmp_path: Path) -> None:
    """Each its own: by it an operator knows how old what was sent is."""
    house = House(tmp_path)

    async def story() -> None:
        async with house.open():
            for _ in range(2):
                before = time.time_ns()
                sent = await passed(
                    lambda pipe: house.service.send_stream(["disk"], None, resumable=False, resume=None, pipe=pipe)
                )
                _, header = next(records(io.BytesIO(sent).read, Counted()))
                assert before <= read_header(header).moment_ns <= time.time_ns()

    tell(story())


def test_clones_of_each_pool_are_told_by_what_they_are_clones_of(tmp_path: Path) -> None:
    """Wherever among the exports of a stream that stands."""
    house = House(tmp_path)
    house.exports = tuple(ExportConfig(name=name, size_bytes=MIB, pool=name) for name in ("default", "fast"))

    async def story() -> None:
        async with house.open(pools=(PoolConfig(), PoolConfig(name="fast"))) as changes:
            for name in ("default", "fast"):
                house.service._exports.get(name).disk.write(0, noise(1) + text(2))
                await changes.copy_export(name, f"{name}@then", read_only=True)
            chosen = ["default@then", "default", "fast@then", "fast"]
            sent = await passed(
                lambda pipe: house.service.send_stream(chosen, None, resumable=False, resume=None, pipe=pipe)
            )
            await passed(lambda pipe: house.service.receive_stream("b-", None, resumable=False, pipe=pipe), sent)
            for name in chosen:
                disks = [house.service._exports.get(found).disk for found in (name, f"b-{name}")]
                assert disks[0].read(0, MIB) == disks[1].read(0, MIB)

    tell(story())


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
            async with service.changes._lock:  # another change is under way as the stream ends
                receiving = asyncio.create_task(passed(receive, stream))
                await until(lambda: bool(service.changes._lock._waiters))
                service.changes._refusal = STARTS
            with pytest.raises(UserError, match="ask again when it runs"):
                await receiving
            service.changes._refusal = None
            assert (len(pool.all_disks()), pool.stats().memory_used) == before
            spoil(house.state_dir / "default.pool", lambda arena: arena.object_of(1) + BLOCK // 2)
            with pytest.raises(UserError, match="is not what was written"):
                await passed(send)
            assert (len(pool.all_disks()), await service.streams()) == (before[0], ())
            pool.disks()[0].write(0, noise(1))

    tell(story())


async def finds_no_room(service: Service) -> None:
    disk = service._exports.get("disk").disk
    with pytest.raises(PoolFull):
        disk.write(4 * MIB, os.urandom(4 * MIB))


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda service: service.stop(), "the server stops"),
        (lambda service: service.hand_over(), "another process takes over; ask that one again"),
        (finds_no_room, streams.ROOM_SAYS),
    ],
    ids=["stop", "takeover", "room"],
)
def test_who_is_sent_a_stream_is_told_what_ended_it(
    end: Callable[[Service], Awaitable[object]], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only that the server went away: in the middle of a chunk is where nearly all of them are ended."""
    monkeypatch.setattr(streams, "WATCH_SECONDS", 0.0)
    ended = cancelled_by(monkeypatch)
    begun, control = threading.Event(), tmp_path / "control.sock"
    disk, pool = ExportConfig(name="disk", size_bytes=8 * MIB), PoolConfig(mem_limit=6 * MIB)

    def receive() -> str:
        def take(_: bytes) -> None:
            begun.set()
            assert ended.wait(GATE_SECONDS)

        with ControlClient(control) as client, pytest.raises(StreamError) as told:
            client.call_for_stream("streams.send", take, exports=["disk"])
        return str(told.value)

    async def story() -> None:
        service = Service(ServerConfig(tcp=(), unix=(), exports=(disk,), pools=(pool,)))
        await service.start()
        server = ControlServer(control, method_table(service, service.changes))
        await server.start()
        service._exports.get("disk").disk.write(0, os.urandom(4 * MIB))
        receiving = asyncio.create_task(asyncio.to_thread(receive))
        assert await asyncio.to_thread(begun.wait, GATE_SECONDS)
        found = await end(service)
        await asyncio.wait({receiving})
        await server.stop()
        if isinstance(found, Handover):
            found.close()
        else:
            await service.stop()
        assert receiving.result() == why

    tell(story())


def cancelled_by(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a stream is told to end."""
    cancelled, real = threading.Event(), Pipe.cancel

    def cancel(pipe: Pipe, reason: str) -> None:
        real(pipe, reason)
        cancelled.set()

    monkeypatch.setattr(Pipe, "cancel", cancel)
    return cancelled


BASES: dict[tuple[str, str], str] = {
    ("disk", "a"): "disk@a",
    ("disk", "disk@a"): "disk@a",
    ("disk@b", "a"): "disk@a",
    ("disk@b", "disk@a"): "disk@a",
    ("other", "frozen"): "frozen",
    ("disk@a", "a"): "there is no snapshot 'a' or 'disk@a@a' in the pool 'default'; take one with `nbdzram snapshot`",
    ("disk", "nobody"): "there is no snapshot 'nobody' or 'disk@nobody' in the pool 'default'",
    ("quick", "frozen"): "there is no snapshot 'frozen' or 'quick@frozen' in the pool 'fast'",
    ("disk", "w"): "the export 'disk@w' may be written, so nothing can be sent since it; snapshot it",
    ("disk", "other"): "the export 'other' may be written",
}


@pytest.mark.parametrize(("name", "since"), BASES)
@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_a_name_says_since_which_snapshot_an_export_is_sent(
    tmp_path: Path, name: str, since: str, *, all_of_them: bool
) -> None:
    """Of all of them those that came later are sent whole."""
    house = House(tmp_path)
    house.exports = (
        ExportConfig(name="disk", size_bytes=MIB),
        ExportConfig(name="other", size_bytes=MIB),
        ExportConfig(name="frozen", size_bytes=MIB, read_only=True),
        ExportConfig(name="quick", size_bytes=MIB, pool="fast"),
    )

    async def story() -> None:
        async with house.open(pools=(PoolConfig(), PoolConfig(name="fast"))) as changes:
            for copy, read_only in (("disk@a", True), ("disk@b", True), ("disk@w", False)):
                await changes.copy_export("disk", copy, read_only=read_only)
            export, words = house.service._exports.get(name), BASES[name, since]
            bases = house.service._streams._bases
            if "there is no snapshot" in words and all_of_them:
                assert bases([export], since, all_of_them=True) == {}
            elif " " in words:
                with pytest.raises(UserError, match=words.replace("`", ".")):
                    bases([export], since, all_of_them=all_of_them)
            else:
                assert bases([export], since, all_of_them=all_of_them)[export].name == words

    tell(story())
