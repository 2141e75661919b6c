"""Attached clients under TLS: every byte in its order, however it is cut, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import ssl
from unittest.mock import ANY

import pytest

from tests.support.pki import Pki
from tests.support.tls_client import GO_DISK, GO_REPLIES, attach, by_hand, leave, pattern
from tests.unit.server.conftest import Play, Secure, Stage
from tests.wire import option, request

READ, WRITE, DISC, FLUSH = range(4)
STRUCTURED_REPLY = 8
MIB = 1 << 20


@pytest.mark.parametrize("style", [0, 1, 2])
def test_every_size_of_request_comes_through(play: Play, secure: Secure, pki: Pki, style: int) -> None:
    """From a byte to more than a socket and all buffers hold, in each reply style."""
    secure()

    async def story(stage: Stage) -> None:
        client = await attach(stage.path, pki.client_context(), style=style)
        for size in (8, 4096, 65536, 65536 + 8, MIB, 24 * MIB):
            content = pattern(size)
            await client.write(4096 - 8, content)
            assert await client.read(4096 - 8, size) == content
        await leave(client)

    play(story)


def test_many_requests_in_flight_are_all_answered(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        client = await attach(stage.path, pki.client_context(), style=1)
        for cookie in range(256):
            client.ask(WRITE, cookie * 4096, 4096, cookie=cookie, payload=cookie.to_bytes(1) * 4096)
        assert {(await client.answer())[0] for _ in range(256)} == set(range(256))
        for cookie in range(256):
            client.ask(READ, cookie * 4096, 4096, cookie=cookie)
        for _ in range(256):
            cookie, answer = await client.answer(read_length=4096)
            assert answer.error == 0
            written = b"" if cookie == 0 else answer.chunks[0][1][8:]  # block 0 is zeroes: a hole
            assert written == (b"" if cookie == 0 else cookie.to_bytes(1) * 4096)
        await leave(client)

    play(story)


@pytest.mark.parametrize("size", [1, 5, 333])
def test_any_split_of_the_ciphertext_gives_the_same_replies(play: Play, secure: Secure, pki: Pki, size: int) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        session = GO_DISK + request(WRITE, 0, 4096, cookie=7) + pattern(4096) + request(READ, 0, 4096, cookie=8)
        ciphertext = hand.encrypt(session)
        for start in range(0, len(ciphertext), size):
            hand.client.send(ciphertext[start : start + size])
            await asyncio.sleep(0)
        replies = await hand.read(GO_REPLIES + 16 + 16 + 4096)
        assert replies[GO_REPLIES + 8 : GO_REPLIES + 16] == b"\0\0\0\0\0\0\0\7"
        assert replies[-4096:] == pattern(4096)
        await leave(hand.client)

    play(story)


@pytest.mark.parametrize("style", [0, 1])
def test_a_client_that_reads_late_gets_everything(play: Play, secure: Secure, pki: Pki, style: int) -> None:
    """The replies fill the socket long before the peer reads; meanwhile a second client is served."""
    secure()
    # Long simple replies leave in order, and structured ones of a single piece: what the test's client understands.
    count, size = ((8, 4 * MIB), (64, MIB // 4))[style]

    async def story(stage: Stage) -> None:
        other = await attach(stage.path, pki.client_context())
        content = pattern(size)
        await other.write(0, content)
        late = await attach(stage.path, pki.client_context(), style=style)
        late.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(count):
            late.ask(READ, 0, len(content), cookie=cookie)
        for _ in range(20):
            assert await other.read(0, 65536) == content[:65536]
        late.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(count):
            _, answer = await late.answer(read_length=len(content))
            assert answer.content == content
        await leave(late)
        await leave(other)

    play(story)


def test_end_of_file_without_close_notify_still_gets_what_was_asked(play: Play, secure: Secure, pki: Pki) -> None:
    """libnbd closes its socket without a word when its user is in a hurry. Complete writes count, half ones do not."""
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        session = request(WRITE, 0, 4096, cookie=7) + pattern(4096) + request(WRITE, 4096, 4096, cookie=8) + bytes(100)
        hand.client.send(hand.encrypt(GO_DISK + session))
        hand.client.writer.write_eof()
        assert len(await hand.read(GO_REPLIES + 16)) == GO_REPLIES + 16
        (connection,) = stage.disk.connections or (None,)
        if connection is not None:
            await connection.closed
        assert stage.disk.disk.read(0, 4096) == pattern(4096)
        assert stage.disk.disk.read(4096, 4096) == bytes(4096)
        await leave(hand.client)

    play(story)


def test_close_notify_is_the_end_of_the_stream_and_is_answered(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        ciphertext = hand.encrypt(GO_DISK + request(READ, 0, 512, cookie=7))
        with pytest.raises(ssl.SSLWantReadError):
            hand.tls.unwrap()
        hand.client.send(ciphertext + hand.outgoing.read())
        assert len(await hand.read(GO_REPLIES + 16 + 512 + 1)) == GO_REPLIES + 16 + 512
        assert await hand.client.at_end()
        await leave(hand.client)

    play(story)


def test_disc_is_answered_with_close_notify_behind_the_last_reply(play: Play, secure: Secure, pki: Pki) -> None:
    """Everything outstanding is answered; the end is no truncation; the client's own close_notify is not awaited."""
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        reads = b"".join(request(READ, 0, MIB, cookie=cookie) for cookie in range(4))
        hand.client.send(hand.encrypt(GO_DISK + reads + request(DISC, 0, 0)))
        replies = await hand.read(GO_REPLIES + 4 * (16 + MIB) + 1)
        assert len(replies) == GO_REPLIES + 4 * (16 + MIB)
        assert await hand.client.at_end()
        await leave(hand.client)

    play(story)


def test_a_forged_record_ends_the_connection_and_changes_nothing(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        hand.client.send(hand.encrypt(GO_DISK))
        await hand.read(GO_REPLIES)
        forged = bytearray(hand.encrypt(request(WRITE, 0, 512) + b"x" * 512))
        forged[-20] ^= 1
        hand.client.send(bytes(forged))
        with pytest.raises(ssl.SSLError):
            await hand.read(1)
        assert stage.disk.disk.read(0, 512) == bytes(512)
        await leave(hand.client)

    play(story)


def test_draining_reaches_clients_under_tls(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        client = await attach(stage.path, pki.client_context())
        client.ask(READ, 0, 1 << 20, cookie=3)
        other = await attach(stage.path, pki.client_context())
        draining = asyncio.ensure_future(stage.server.drain())
        assert await client.answer(read_length=1 << 20) == (3, ANY)
        assert await client.at_end()
        assert await other.at_end()
        await draining
        await leave(client)
        await leave(other)

    play(story)


def test_what_came_before_the_end_of_file_is_answered_in_later_turns(play: Play, secure: Secure, pki: Pki) -> None:
    secure()
    count = 280

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        hand.client.send(hand.encrypt(GO_DISK))
        await hand.read(GO_REPLIES)
        hand.client.send(b"".join(hand.encrypt(bytes([byte])) for byte in request(FLUSH, 0, 0) * count))
        hand.client.writer.write_eof()
        assert len(await hand.read(16 * count + 1)) == 16 * count
        await leave(hand.client)

    play(story)


@pytest.mark.parametrize("style", [0, 1])
def test_what_comes_behind_go_is_served_however_much_it_is(play: Play, secure: Secure, pki: Pki, style: int) -> None:
    """More than the handshake takes at once, and then silence: the rest lies in OpenSSL, not in the socket."""
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        content = pattern(100_000)
        said = (option(STRUCTURED_REPLY) if style else b"") + GO_DISK
        said += request(WRITE, 0, len(content), cookie=7) + content + request(FLUSH, 0, 0, cookie=8)
        ciphertext = hand.encrypt(said)
        hand.client.send(ciphertext)
        answered = (20 if style else 0) + GO_REPLIES + 2 * (20 if style else 16)
        async with asyncio.timeout(20):
            replies = await hand.read(answered)
        assert len(replies) == answered
        assert stage.disk.disk.read(0, len(content)) == content
        await leave(hand.client)

    play(story)


@pytest.mark.parametrize("command", ["end", "abort"])
def test_a_client_that_is_cut_in_a_stream_of_large_writes_takes_nobody_with_it(
    play: Play, secure: Secure, pki: Pki, command: str
) -> None:
    secure()

    async def story(stage: Stage) -> None:
        other = await attach(stage.path, pki.client_context())
        for _ in range(5):
            hand = await by_hand(stage.path, pki.client_context())
            hand.client.send(hand.encrypt(GO_DISK + request(WRITE, 0, 24 * MIB)))
            await hand.read(GO_REPLIES)
            attached = stage.server.sessions[-1]
            hand.client.send(hand.encrypt(bytes(16 * MIB)))
            while attached.session.payload_remaining in (0, 24 * MIB):  # noqa: ASYNC110
                await asyncio.sleep(0)
            if command == "end":
                await stage.server.end([attached])
            else:
                attached.abort()
                await attached.closed
            await leave(hand.client)
            assert await other.read(0, 512) == bytes(512)
        await leave(other)

    play(story)
