"""Clients that come to rest for a takeover, and those that do not: who is waited for, and by whom."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from nbdzram.config import ExportConfig, Limits, ServerConfig, UnixAddress
from nbdzram.receive import receive_exactly
from nbdzram.server import listener
from nbdzram.server.connection import Connection
from nbdzram.server.handover import Handover
from nbdzram.server.hosting import Hosted, Hosting
from nbdzram.server.service import Service
from tests.support.nbd_client import Client as Wire
from tests.support.nbd_client import open_socket
from tests.unit.server.house import GATE_SECONDS, GatedDisk, tell
from tests.wire import CMD_READ, CMD_WRITE, request

STOPS = ("reading", "sending", "sending what is refused", "sending what there is no room for")


def serving(place: Path, stops: str = "") -> ServerConfig:
    return ServerConfig(
        tcp=(),
        unix=(UnixAddress(path=place / "nbd.sock"),),
        exports=(ExportConfig(name="disk", size_bytes=1 << 24),),
        limits=Limits(total_bytes=1 << 20) if stops.endswith("no room for") else Limits(),
    )


@pytest.mark.parametrize("stops", STOPS)
def test_who_stands_still_is_waited_for_while_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    """A machine that was stopped, say: the pause that all others have is not that of waiting for it."""
    monkeypatch.setattr(listener, "REST_SECONDS", 0.2)
    order: list[int] = []

    def note(number: int, _: object) -> None:
        order.append(number)

    async def story() -> None:
        service = Service(serving(tmp_path, stops))
        await service.start()
        first, second, third = [await asyncio.to_thread(Wire, tmp_path / "nbd.sock", "disk") for _ in range(3)]
        one, still, other = service._nbd.sessions
        stop(second.socket, stops)
        while not still.stands_still:  # noqa: ASYNC110 - a condition of its thread
            await asyncio.sleep(0.01)
        for session in (one, still, other):
            session.closed.add_done_callback(partial(note, session.number))
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        assert order[0] == still.number
        assert [client.number for client in handed.clients] == [one.number, other.number]
        handed.close()
        for client in (first, second, third):
            client.socket.close()

    tell(story())


def test_who_stood_still_and_reads_again_is_handed_over_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        service, wire, still = await with_one_who_stands_still(tmp_path)
        released, release = asyncio.Event(), still.release

        def note() -> None:
            release()
            released.set()

        monkeypatch.setattr(still, "release", note)
        service._nbd.prepare_to_hand_over()
        handing = asyncio.create_task(service.hand_over())
        await released.wait()
        reading = threading.Thread(target=read_all, args=(wire.socket,))
        reading.start()
        handed = await handing
        assert [client.number for client in handed.clients] == [still.number]
        handed.close()
        await asyncio.to_thread(reading.join)
        wire.socket.close()

    tell(story())


@pytest.mark.parametrize("stops", STOPS)
def test_who_stops_in_the_moment_of_a_takeover_is_not_waited_for_as_long_as_who_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    """Who goes on would have an hour here, and the test none of that."""
    monkeypatch.setattr(listener, "REST_SECONDS", 3600.0)
    monkeypatch.setattr(listener, "STOPPED_SECONDS", 0.2)

    async def story() -> None:
        service = Service(serving(tmp_path, stops))
        await service.start()
        first, second = [await asyncio.to_thread(Wire, tmp_path / "nbd.sock", "disk") for _ in range(2)]
        one, other = service._nbd.sessions
        release = other.release

        def stop_and_release() -> None:  # behind the look for those that stand still already
            stop(second.socket, stops)
            while not other.session.waits_for_peer:
                time.sleep(0.001)
            release()

        monkeypatch.setattr(other, "release", stop_and_release)
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        assert [client.number for client in handed.clients] == [one.number]
        handed.close()
        for client in (first, second):
            client.socket.close()

    tell(story())


def test_who_waits_for_room_goes_with_those_that_stand_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let in where the others were, he would stand still in the middle of his own payload, and everybody wait again."""
    monkeypatch.setattr(listener, "REST_SECONDS", 0.2)
    whole = request(CMD_WRITE, 0, 1 << 24) + bytes(1000)

    async def story() -> None:
        service = Service(serving(tmp_path, STOPS[-1]))
        await service.start()
        wires = [await asyncio.to_thread(Wire, tmp_path / "nbd.sock", "disk") for _ in range(2)]
        still, waits = service._nbd.sessions
        for wire, session in zip(wires, (still, waits), strict=True):
            wire.socket.sendall(whole)
            while not session.stands_still and not session.waits_for_room:  # noqa: ASYNC110 - conditions of its thread
                await asyncio.sleep(0.01)
        assert waits.waits_for_room
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        assert [(client.number, client.rest) for client in handed.clients] == [(waits.number, whole)]
        handed.close()
        for wire in wires:
            wire.socket.close()

    tell(story())


def test_who_reads_some_of_a_long_answer_does_not_stand_still(tmp_path: Path) -> None:
    async def story() -> None:
        service, wire, session = await with_one_who_stands_still(tmp_path)
        before = session.still_seconds
        await asyncio.to_thread(receive_exactly, wire.socket.recv, 400 << 10, "a part of the first answer")
        while session.still_seconds >= before:  # noqa: ASYNC110 - a condition of its thread
            await asyncio.sleep(0.01)
        assert session.session.waits_for_peer
        wire.socket.close()
        await service.stop()

    tell(story())


def test_who_was_accepted_in_the_moment_of_a_takeover_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has the connection, and has not told of it: nobody would have waited for it, nor let it in."""

    async def story() -> None:
        service = Service(serving(tmp_path))
        await service.start()
        accepted = asyncio.Event()

        class Accepted(Connection):
            def __init__(self, hosting: Hosting, uri: str) -> None:
                super().__init__(hosting, uri)
                accepted.set()

        monkeypatch.setattr(listener, "Connection", Accepted)
        connecting = asyncio.create_task(asyncio.to_thread(Wire, tmp_path / "nbd.sock", "disk"))
        await accepted.wait()
        service._nbd.prepare_to_hand_over()
        handed = await service._nbd.hand_over()
        wire = await connecting
        assert [client.export for client in handed.clients] == ["disk"]
        handed.close()
        wire.socket.close()
        await service.stop()

    tell(story())


def test_who_has_begun_a_handshake_may_end_it_and_who_is_silent_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who is far away and attaches is told of no error; one who only knocked would keep all others waiting."""
    monkeypatch.setattr(listener, "HANDSHAKE_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(listener, "HAGGLING_SECONDS", 3600.0)

    async def story() -> None:
        service = Service(serving(tmp_path))
        await service.start()
        silent = open_socket(tmp_path / "nbd.sock")
        far = await asyncio.to_thread(Wire, tmp_path / "nbd.sock", None)
        hosting = service._nbd._hosting
        assert hosting is not None
        while len(hosting.haggling) < 2 or not any(one.spoke for one in hosting.haggling):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        service._nbd.prepare_to_hand_over()
        handing = asyncio.create_task(service._nbd.hand_over())
        await asyncio.sleep(0)
        await asyncio.to_thread(far.go, "disk")
        handed = await handing
        assert [client.export for client in handed.clients] == ["disk"]
        assert await asyncio.to_thread(silent.recv, 1 << 10)  # the greeting
        handed.close()
        for connection in (far.socket, silent):
            connection.close()
        await service.stop()

    tell(story())


def test_a_walk_over_the_tables_ends_while_clients_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large export it takes seconds, and any look at the metrics may have begun one."""
    rested: list[bool] = []

    async def story() -> None:
        service = Service(serving(tmp_path))
        await service.start()
        wire = await asyncio.to_thread(Wire, tmp_path / "nbd.sock", "disk")
        export = service._exports.get("disk")
        gated = GatedDisk(export.disk, "usage")
        export.disk = gated  # type: ignore[assignment]
        walking = asyncio.create_task(service.usage())
        assert await asyncio.to_thread(gated.reached.wait, GATE_SECONDS)
        rest = service._nbd.hand_over

        async def note() -> Handover:
            rested.append(gated.open.is_set())
            return await rest()

        monkeypatch.setattr(service._nbd, "hand_over", note)
        service._nbd.prepare_to_hand_over()
        handing = asyncio.create_task(service.hand_over())
        while not service._usages._stopping:  # noqa: ASYNC110 - a condition of another task
            await asyncio.sleep(0)
        assert await asyncio.to_thread(wire.read, 0, 4096) == bytes(4096)
        gated.open.set()
        handed = await handing
        assert rested == [True], "clients waited for it"
        await walking
        handed.close()
        wire.socket.close()

    tell(story())


async def with_one_who_stands_still(place: Path) -> tuple[Service, Wire, Hosted]:
    """A server, and its one client, that asked for much and reads none of it."""
    service = Service(serving(place))
    await service.start()
    wire = await asyncio.to_thread(Wire, place / "nbd.sock", "disk")
    (session,) = service._nbd.sessions
    stop(wire.socket, "reading")
    while not session.stands_still:  # noqa: ASYNC110 - a condition of its thread
        await asyncio.sleep(0.01)
    return service, wire, session


def stop(connection: socket.socket, how: str) -> None:
    """Ask for more than goes into a socket, and read none of it; or send a part of a payload."""
    if how == "reading":
        for cookie in range(8):
            connection.sendall(request(CMD_READ, 0, 1 << 20, cookie=cookie))
    else:
        behind_the_end = 1 << 24 if how.endswith("refused") else 0
        connection.sendall(request(CMD_WRITE, behind_the_end, 1 << 20, cookie=1) + bytes(1000))


def read_all(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # it asked for more than it was answered here
        while connection.recv(1 << 20):
            pass
