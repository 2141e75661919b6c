"""Many control connections at once: silent ones make room, the operator is let in, and each is told true words."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.control import server as server_module
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import Method
from nbdzram.control.server import MAX_CONNECTIONS, ControlServer
from nbdzram.errors import ServerUnreachable, UserError

STATUS = b'{"jsonrpc":"2.0","method":"status","id":1}\n'
WORK = b'{"jsonrpc":"2.0","method":"work","id":1}\n'

Talk = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)


class Crowd:
    """A control server with a quick method and one that goes on until it is told to end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = asyncio.Event()
        self.working = 0
        self.server = ControlServer(
            path, {"status": Method({}, self.quick, is_act=False), "work": Method({}, self.slow, is_act=False)}
        )
        self._opened: list[asyncio.StreamWriter] = []

    async def quick(self, *_: Any) -> str:
        return "here"

    async def slow(self, *_: Any) -> str:
        self.working += 1
        await self.end.wait()
        return "done"

    async def connect(self, request: bytes = b"") -> Talk:
        reader, writer = await asyncio.open_unix_connection(self.path)
        self._opened.append(writer)
        writer.write(request)
        return reader, writer

    async def known(self, count: int) -> None:
        """Until the server has so many connections."""
        await until(lambda: len(self.server._conversations) == count)

    async def close(self) -> None:
        for writer in self._opened:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def crowd_at(path: Path) -> AsyncIterator[Crowd]:
    crowd = Crowd(path)
    await crowd.server.start()
    try:
        yield crowd
    finally:
        crowd.end.set()
        await crowd.close()
        await crowd.server.stop()


@pytest.fixture
def tell(tmp_path: Path) -> Callable[[Callable[[Crowd], Awaitable[None]]], None]:
    def run(story: Callable[[Crowd], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with crowd_at(tmp_path / "control.sock") as crowd:
                async with asyncio.timeout(60):
                    await story(crowd)

        uvloop.run(whole())  # as `serve` does: its transports, unlike asyncio's, refuse to be written to when closed

    return run


Tell = Callable[[Callable[[Crowd], Awaitable[None]]], None]


async def heard(talk: Talk) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(await talk[0].readline())
    return said


def test_the_65th_connection_takes_the_place_of_the_one_that_was_silent_longest(tell: Tell) -> None:
    async def story(crowd: Crowd) -> None:
        oldest, *rest = [await crowd.connect() for _ in range(MAX_CONNECTIONS)]
        await crowd.known(MAX_CONNECTIONS)
        operator = await crowd.connect(STATUS)
        assert (await heard(operator))["result"] == "here"
        assert "silent for the longest time, made room" in (await heard(oldest))["error"]["message"]
        assert await oldest[0].read() == b""
        for talk in rest:
            talk[1].write(STATUS)
            assert (await heard(talk))["result"] == "here"

    tell(story)


def test_who_asked_a_moment_ago_stays_before_who_is_silent(tell: Tell) -> None:
    async def story(crowd: Crowd) -> None:
        first, second, *_ = [await crowd.connect() for _ in range(MAX_CONNECTIONS)]
        await crowd.known(MAX_CONNECTIONS)
        first[1].write(STATUS)
        await heard(first)
        await crowd.connect(STATUS)
        assert "made room" in (await heard(second))["error"]["message"]
        first[1].write(STATUS)
        assert (await heard(first))["result"] == "here"

    tell(story)


def test_half_a_request_is_silence_and_an_answer_that_nobody_reads_too(tell: Tell) -> None:
    async def story(crowd: Crowd) -> None:
        half = await crowd.connect(STATUS[:-1])
        await crowd.known(1)
        for _ in range(MAX_CONNECTIONS - 1):
            await crowd.connect()
        await crowd.known(MAX_CONNECTIONS)
        assert (await heard(await crowd.connect(STATUS)))["result"] == "here"
        assert "made room" in (await heard(half))["error"]["message"]

    tell(story)


def test_connections_that_all_work_are_let_work_and_the_next_is_told_so(tell: Tell) -> None:
    async def story(crowd: Crowd) -> None:
        busy = [await crowd.connect(WORK) for _ in range(MAX_CONNECTIONS)]
        await until(lambda: crowd.working == MAX_CONNECTIONS)

        def ask() -> None:
            with ControlClient(crowd.path) as client:
                client.call("status")

        with pytest.raises(UserError, match=f"all {MAX_CONNECTIONS} control connections are at work on requests"):
            await asyncio.to_thread(ask)
        crowd.end.set()
        for talk in busy:
            assert (await heard(talk))["result"] == "done"

    tell(story)


def test_who_cannot_be_known_is_turned_away_with_the_reason(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async def story(crowd: Crowd) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("nbdzram.control.server.os.dup", refuse)
            refused = await heard(await crowd.connect(STATUS))
        assert "cannot tell who connects: Too many open files; raise" in refused["error"]["message"]
        assert (await heard(await crowd.connect(STATUS)))["result"] == "here"

    tell(story)


def test_a_connection_whose_peer_hung_up_during_its_request_makes_room_first(tell: Tell) -> None:
    async def story(crowd: Crowd) -> None:
        silent = [await crowd.connect() for _ in range(MAX_CONNECTIONS - 1)]
        _, gone = await crowd.connect(WORK)
        await until(lambda: crowd.working == 1)
        (conversation,) = [one for one in crowd.server._conversations.values() if one.waiting_since is None]
        gone.close()
        await until(lambda: conversation.gone)
        assert (await heard(await crowd.connect(STATUS)))["result"] == "here"
        for talk in silent:
            talk[1].write(STATUS)
            assert (await heard(talk))["result"] == "here"

    tell(story)


def test_a_connection_that_broke_during_its_request_makes_room_without_being_told(tell: Tell) -> None:
    """Its peer hung up, and progress that was sent to it broke it: there is nothing to write to any more."""

    async def story(crowd: Crowd) -> None:
        for _ in range(MAX_CONNECTIONS):
            await crowd.connect(WORK)
        await until(lambda: crowd.working == MAX_CONNECTIONS)
        broken = next(iter(crowd.server._conversations.values()))
        broken.writer.transport.abort()
        await until(broken.reader.at_eof)  # which the transport tells as the last thing before it is closed
        assert (await heard(await crowd.connect(STATUS)))["result"] == "here"

    tell(story)


def test_who_never_asks_is_ended_after_a_while_and_told_why(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_SECONDS", 0.05)

    async def story(crowd: Crowd) -> None:
        asked = await crowd.connect(STATUS)
        assert (await heard(asked))["result"] == "here"
        silent = await crowd.connect()
        assert "was silent for 0.05 s" in (await heard(silent))["error"]["message"]
        assert await silent[0].read() == b""
        asked[1].write(STATUS)
        assert (await heard(asked))["result"] == "here"  # who asked once may rest, as `top` does

    tell(story)


def test_a_command_is_told_what_the_server_said_before_it_hung_up(tmp_path: Path) -> None:
    """And not that a pipe broke."""

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"jsonrpc":"2.0","error":{"code":-32000,"message":"no place"},"id":null}\n')
        writer.close()

    async def story() -> None:
        server = await asyncio.start_unix_server(refuse, tmp_path / "control.sock")

        def ask() -> None:
            with ControlClient(tmp_path / "control.sock") as client:
                hung_up = select.poll()
                hung_up.register(client._socket, 0)
                assert hung_up.poll(60_000)
                client.call("status")

        async with server:
            with pytest.raises(UserError, match="no place"):
                await asyncio.to_thread(ask)

    asyncio.run(story())


def test_a_server_that_hangs_up_without_a_word_went_away(tmp_path: Path) -> None:
    async def story() -> None:
        server = await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "control.sock")

        def ask() -> None:
            with ControlClient(tmp_path / "control.sock") as client:
                client.call("status")

        async with server:
            with pytest.raises(ServerUnreachable, match="went away"):
                await asyncio.to_thread(ask)

    asyncio.run(story())


def test_a_socket_that_another_server_put_in_its_place_stays(tmp_path: Path) -> None:
    """One that took over, or was started when somebody had removed the first."""
    path = tmp_path / "control.sock"

    async def story() -> None:
        async with crowd_at(path):
            path.unlink()
            successor = ControlServer(path, {})
            await successor.start()
        stays = path.is_socket()
        await successor.stop()
        assert (stays, path.exists()) == (True, False)

    uvloop.run(story())
