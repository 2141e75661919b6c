"""TLS while a client haggles: what waits for the peer, how it ends, and to whom the socket belongs afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from nbdzram.ready import readable
from nbdzram.server.tls_transport import TlsTransport
from nbdzram.sessions.tls_context import TlsContext
from tests.support.pki import Pki
from tests.support.tls_client import pattern
from tests.support.tls_pair import Pair

MIB = 1 << 20


class Haggler:
    """What a Connection is told."""

    def __init__(self) -> None:
        self.buffer = bytearray(16 << 10)
        self.told: list[str] = []
        self.received = bytearray()

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append(f"lost {type(exc).__name__}")

    def tls_established(self, names: frozenset[str]) -> None:
        self.told.append(f"established {sorted(names)}")

    def tls_failed(self, error: Exception) -> None:
        self.told.append(f"failed {error}")

    def expel(self, reason: str) -> None:
        self.told.append(f"expelled {reason}")


class Stage:
    """A transport that has shaken hands."""

    transport: TlsTransport

    def __init__(self, pair: Pair, haggler: Haggler) -> None:
        self.pair = pair
        self.haggler = haggler
        self.turns_asked = 0

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():  # noqa: ASYNC110 - the loop has a step to do
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        """All that comes to the client up to close_notify."""
        plain = b""
        async with asyncio.timeout(20):
            while True:
                plain += self.pair.receive()
                with contextlib.suppress(ssl.SSLWantReadError):
                    if not self.pair.tls.read(1):
                        return plain
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def standing(context: TlsContext, trust: ssl.SSLContext) -> AsyncIterator[Stage]:
    pair, haggler, loop = Pair(context, trust), Haggler(), asyncio.get_running_loop()

    def call_soon(step: Callable[[], None]) -> None:
        stage.turns_asked += 1
        loop.call_soon(step)

    stage = Stage(pair, haggler)
    stage.transport = TlsTransport(loop, pair.line, haggler, call_soon)
    shaking = pair.shaking()
    await stage.until(lambda: shaking() and bool(haggler.told))
    assert haggler.told == ["established []"]
    haggler.told.clear()
    yield stage
    stage.transport.abort()
    pair.socket.close()
    await asyncio.sleep(0)


Play = Callable[[Callable[[Stage], Awaitable[None]]], None]


@pytest.fixture
def play(pki: Pki, certificate: tuple[Path, Path]) -> Play:
    context = TlsContext()
    context.use_certificate(*map(bytes, certificate))

    def run(story: Callable[[Stage], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with standing(context, pki.client_context()) as stage:
                await story(stage)

        uvloop.run(whole())

    return run


def test_a_reply_that_the_peer_does_not_take_waits_and_is_told_of(play: Play) -> None:
    async def story(stage: Stage) -> None:
        content = pattern(2 * MIB)
        stage.transport.write(content)
        assert stage.haggler.told == ["pause"]
        assert stage.transport.get_write_buffer_size() > 0
        stage.transport.write(b"behind")
        stage.transport.close()
        assert await stage.read() == content + b"behind"
        await stage.until(lambda: len(stage.haggler.told) == 2)
        assert stage.haggler.told == ["pause", "lost NoneType"]

    play(story)


def test_writing_goes_on_when_the_peer_reads_again(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.transport.write(bytes(2 * MIB))
        got = 0
        while got < 2 * MIB:
            got += len(stage.pair.receive())
            await asyncio.sleep(0)
        await stage.until(lambda: stage.haggler.told == ["pause", "resume"])
        assert stage.transport.get_write_buffer_size() == 0

    play(story)


def test_a_record_that_comes_in_two_parts_is_received_once_it_is_whole(play: Play) -> None:
    async def story(stage: Stage) -> None:
        turns = stage.turns_asked
        send_rest = stage.pair.send_in_two(b"an option", 7)
        await stage.until(lambda: stage.turns_asked > turns)
        for _ in range(20):
            await asyncio.sleep(0)  # the turn that it asked for comes, and finds a part of a record
        assert not stage.haggler.received
        send_rest()
        await stage.until(lambda: stage.haggler.received == b"an option")

    play(story)


def test_nothing_is_taken_while_reading_is_paused(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.transport.pause_reading()
        stage.pair.send(b"an option", b"and another")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stage.haggler.received
        stage.transport.resume_reading()
        await stage.until(lambda: stage.haggler.received == b"an optionand another")

    play(story)


def test_a_line_that_was_given_away_is_watched_no_more(play: Play) -> None:
    """Its socket is a thread's; after that its number may be anybody's."""

    async def story(stage: Stage) -> None:
        fd = stage.transport.line.fileno()
        stage.transport.resume_reading()
        stage.transport.detach()
        asked = stage.turns_asked
        stage.pair.send(b"a request")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stage.haggler.received
        assert stage.turns_asked == asked
        buffer = bytearray(100)
        assert stage.pair.line.receive(buffer) == 9
        stage.transport.abort()  # somebody's who does not know of it yet: it is no longer ours to cut
        assert stage.pair.line.fileno() == fd
        assert not stage.haggler.told
        stage.pair.line.close(orderly=False)

    play(story)


@pytest.mark.parametrize("end", ["abort", "vanish", "break", "leave"])
def test_an_end_is_told_once_and_closes_the_socket(play: Play, end: str) -> None:
    async def story(stage: Stage) -> None:
        if end == "abort":
            stage.transport.abort()
            stage.transport.abort()
        elif end == "vanish":
            stage.pair.socket.close()
        elif end == "break":
            stage.pair.socket.close()
            stage.transport.write(b"x")
            assert not stage.haggler.told, "who writes is told in the middle of it"
        else:
            with contextlib.suppress(ssl.SSLWantReadError):
                stage.pair.tls.unwrap()
            stage.pair.flush()
        await stage.until(lambda: bool(stage.haggler.told))
        await asyncio.sleep(0)
        assert stage.haggler.told == [f"lost {'BrokenPipeError' if end == 'break' else 'NoneType'}"]
        assert stage.pair.line.fileno() == -1

    play(story)


def test_a_record_that_is_none_expels(play: Play) -> None:
    async def story(stage: Stage) -> None:
        stage.pair.socket.sendall(stage.pair.forge(100))
        await stage.until(lambda: bool(stage.haggler.told))
        assert "bad" in stage.haggler.told[0]

    play(story)


def test_a_handshake_that_fails_says_why_to_both(play: Play, certificate: tuple[Path, Path]) -> None:
    async def story(stage: Stage) -> None:
        context = TlsContext()
        context.use_certificate(*map(bytes, certificate))
        pair, haggler, loop = Pair(context, ssl.create_default_context()), Haggler(), asyncio.get_running_loop()
        transport = TlsTransport(loop, pair.line, haggler, loop.call_soon)
        pair.socket.sendall(b"\x16\x03\x01\x00\x04\x0b\x00\x00\x00")  # a certificate, and nobody has said hello
        await stage.until(lambda: bool(haggler.told))
        assert haggler.told == ["failed unexpected message"]
        transport.close()
        assert pair.socket.recv(1) == b"\x15"  # an alert
        pair.socket.close()
        await stage.until(lambda: len(haggler.told) == 2)

    play(story)


@pytest.mark.parametrize("end", ["orderly", "cut"])
def test_who_goes_in_the_middle_of_the_handshake_is_gone(play: Play, certificate: tuple[Path, Path], end: str) -> None:
    async def story(stage: Stage) -> None:
        context = TlsContext()
        context.use_certificate(*map(bytes, certificate))
        pair, haggler, loop = Pair(context, ssl.create_default_context()), Haggler(), asyncio.get_running_loop()
        TlsTransport(loop, pair.line, haggler, loop.call_soon)
        pair.say_hello()
        await stage.until(lambda: bool(readable(pair.socket.fileno(), seconds=0)))
        if end == "orderly":
            pair.fetch()
        pair.socket.close()  # with what was not read yet that is a reset
        await stage.until(lambda: bool(haggler.told))
        assert haggler.told == ["lost NoneType" if end == "orderly" else "lost ConnectionResetError"]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(pair.line.fileno())

    play(story)


def test_a_handshake_goes_on_when_the_peer_reads_again(play: Play, pki: Pki, certificate: tuple[Path, Path]) -> None:
    async def story(stage: Stage) -> None:
        context = TlsContext()
        context.use_certificate(*map(bytes, certificate))
        pair, haggler, loop = Pair(context, pki.client_context()), Haggler(), asyncio.get_running_loop()
        before = 0
        with socket.socket(fileno=os.dup(pair.line.fileno())) as same, contextlib.suppress(BlockingIOError):
            while True:
                before += same.send(b"x", socket.MSG_DONTWAIT)  # until there is no room for its answer to a hello
        transport = TlsTransport(loop, pair.line, haggler, loop.call_soon)
        pair.say_hello()
        await stage.until(lambda: pair.line.waits_to_write)
        while before:
            before -= len(pair.socket.recv(before))
        shaking = pair.shaking()
        await stage.until(lambda: shaking() and bool(haggler.told))
        assert haggler.told == ["established []"]
        transport.abort()
        pair.socket.close()

    play(story)


def test_a_socket_pair_is_what_it_seems() -> None:
    """What the others here lean on: a peer that is gone is a broken pipe, and not a reset."""
    one, other = socket.socketpair()
    other.close()
    with one, pytest.raises(BrokenPipeError):
        one.send(b"x")
