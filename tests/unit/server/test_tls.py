"""TLS on real sockets: who gets in, what is never executed, how it ends, and that it costs no correctness."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from nbdzram.config import Access, Limits, TlsConfig, TlsMode
from nbdzram.errors import ConfigError
from nbdzram.nbd.constants import Reply
from nbdzram.server.attached import Attached
from nbdzram.server.channel import TlsChannel
from nbdzram.server.connection import Connection
from nbdzram.server.exports import Export
from nbdzram.server.tls import TlsFiles, make_context
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.unit.server.conftest import Play, Stage
from tests.wire import name_and_infos, option, request

READ, WRITE, DISC, FLUSH = range(4)
STARTTLS, LIST, GO, STRUCTURED_REPLY, ABORT = 5, 3, 7, 8, 2
MIB = 1 << 20


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def certificate(pki: Pki) -> tuple[Path, Path]:
    return pki.issue("localhost", file="server")


Secure = Callable[..., None]


@pytest.fixture
def secure(stage: Stage, certificate: tuple[Path, Path]) -> Secure:
    """Give the stage's server TLS: secure(mode=..., client_ca=...)."""

    def give(*, mode: TlsMode = TlsMode.ON, client_ca: Path | None = None) -> None:
        tls = TlsConfig(mode=mode, certificate=certificate[0], key=certificate[1], client_ca=client_ca)
        stage.config = replace(stage.config, tls=tls)

    return give


async def leave(client: WireClient) -> None:
    """Close a connection that the server may have closed before."""
    with contextlib.suppress(OSError, ssl.SSLError):
        await client.close()


async def start_tls(client: WireClient, context: ssl.SSLContext) -> None:
    assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
    await client.writer.start_tls(context, server_hostname="localhost")


async def attach(stage: Stage, context: ssl.SSLContext, name: bytes = b"disk", **negotiated: int) -> WireClient:
    client = await WireClient.connect(stage.path)
    await start_tls(client, context)
    return await client.go(name, **negotiated)  # type: ignore[arg-type]


class ByHand:
    """A TLS client whose ciphertext a test sends as it likes."""

    def __init__(self, client: WireClient, context: ssl.SSLContext) -> None:
        self.client = client
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.client.send(self.outgoing.read())
                await self.receive()
            else:
                self.client.send(self.outgoing.read())
                return

    async def receive(self) -> None:
        ciphertext = await self.client.reader.read(65536)
        if ciphertext:
            self.incoming.write(ciphertext)
        else:
            self.incoming.write_eof()

    def encrypt(self, plain: bytes) -> bytes:
        view = memoryview(plain)
        while view:
            view = view[self.tls.write(view) :]
        return self.outgoing.read()

    async def read(self, size: int) -> bytes:
        """Exactly `size` plain bytes; fewer at the end of the stream."""
        plain = b""
        while len(plain) < size:
            try:
                part = self.tls.read(size - len(plain))
            except ssl.SSLWantReadError:
                await self.receive()
            except ssl.SSLZeroReturnError:  # close_notify
                return plain
            else:
                if not part:  # the same, when we have not said it ourselves
                    return plain
                plain += part
        return plain


async def by_hand(stage: Stage, context: ssl.SSLContext) -> ByHand:
    client = await WireClient.connect(stage.path)
    assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
    hand = ByHand(client, context)
    await hand.handshake()
    return hand


GO_DISK = option(GO, name_and_infos(b"disk"))
GO_REPLIES = 20 + 12 + 20  # INFO_EXPORT and ACK


def pattern(size: int) -> bytes:
    return b"".join(number.to_bytes(8) for number in range(size // 8))


@pytest.mark.parametrize("style", [0, 1, 2])
def test_every_size_of_request_comes_through(play: Play, secure: Secure, pki: Pki, style: int) -> None:
    """From a byte to more than a socket and all buffers hold, in each reply style."""
    secure()

    async def story(stage: Stage) -> None:
        client = await attach(stage, pki.client_context(), style=style)
        for size in (8, 4096, 65536, 65536 + 8, MIB, 24 * MIB):
            content = pattern(size)
            await client.write(4096 - 8, content)
            assert await client.read(4096 - 8, size) == content
        await leave(client)

    play(story)


def test_many_requests_in_flight_are_all_answered(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        client = await attach(stage, pki.client_context(), style=1)
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
        hand = await by_hand(stage, pki.client_context())
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
        other = await attach(stage, pki.client_context())
        content = pattern(size)
        await other.write(0, content)
        late = await attach(stage, pki.client_context(), style=style)
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


def test_starttls_resets_what_was_settled_in_the_clear(play: Play, secure: Secure, pki: Pki) -> None:
    """Structured replies agreed on before TLS are not sent after it."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STRUCTURED_REPLY))[-1].kind == Reply.ACK
        await start_tls(client, pki.client_context())
        await client.go(b"disk", style=0)
        client.ask(READ, 0, 512)
        assert (await client.reader.readexactly(4)).hex() == "67446698"
        await leave(client)

    play(story)


def test_an_option_in_the_clear_behind_starttls_is_never_executed(play: Play, secure: Secure) -> None:
    """An attacker in the middle adds GO to the client's STARTTLS: the connection ends with a TLS alert, unanswered."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        client.send(option(STARTTLS) + GO_DISK + request(WRITE, 0, 512) + bytes(512))
        received = await client.reader.read()
        assert received[20:21] in (b"", b"\x15"), "something else than an alert"
        assert stage.server.handshake_failures["tls"] == 1
        assert not stage.disk.connections
        await leave(client)

    play(story)


def test_a_server_that_requires_tls_serves_nothing_without(play: Play, secure: Secure, pki: Pki) -> None:
    """Every option but ABORT gets TLS_REQD, and never again once TLS runs."""
    secure(mode=TlsMode.REQUIRE)

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        for number in (LIST, GO, STRUCTURED_REPLY, 99):
            assert (await client.option(number, b""))[-1].kind == Reply.ERR_TLS_REQD
        await start_tls(client, pki.client_context())
        assert (await client.option(LIST))[-1].kind == Reply.ACK
        assert (await client.option(99))[-1].kind == Reply.ERR_UNSUP
        assert (await client.option(STARTTLS))[-1].kind == Reply.ERR_INVALID
        assert (await client.option(ABORT))[-1].kind == Reply.ACK
        await leave(client)

    play(story)


def test_a_client_without_a_certificate_is_turned_away_where_one_is_asked_for(
    play: Play, secure: Secure, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):  # TLS 1.3 tells it after the handshake
            await hand.read(1)
        assert stage.server.handshake_failures["tls"] == 1
        await leave(hand.client)
        friend = await attach(stage, pki.client_context("vm1.example"))
        assert await friend.read(0, 512) == bytes(512)
        await leave(friend)

    with caplog.at_level(logging.INFO):
        play(story)
    (told,) = (record.getMessage() for record in caplog.records if record.name == "nbdzram.attached")
    assert told.endswith("attached to export 'disk' with the certificate of vm1.example")


def test_a_certificate_of_another_authority_is_turned_away(
    play: Play, secure: Secure, pki: Pki, tmp_path: Path
) -> None:
    secure(client_ca=pki.authority)
    stranger = Pki(tmp_path / "stranger", authority="somebody else")

    async def story(stage: Stage) -> None:
        context = pki.client_context()
        context.load_cert_chain(*stranger.issue("vm1.example", file="vm1"))
        hand = await by_hand(stage, context)
        with pytest.raises(ssl.SSLError, match=r"UNKNOWN_CA|DECRYPT_ERROR|alert"):
            await hand.read(1)
        await leave(hand.client)

    play(story)


def test_an_export_for_one_certificate_does_not_exist_for_others(play: Play, secure: Secure, pki: Pki) -> None:
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        disk = stage.disk.disk
        stage.exports.add(
            Export(
                name="inner",
                disk=disk,
                pool_name="default",
                access=Access(certificates=("vm1.example",)),
                read_only=False,
            )
        )
        friend = await attach(stage, pki.client_context("vm1.example"), b"inner")
        await leave(friend)
        other = await WireClient.connect(stage.path)
        await start_tls(other, pki.client_context("vm2.example"))
        assert (await other.option(GO, name_and_infos(b"inner")))[-1].kind == Reply.ERR_UNKNOWN
        assert all(b"inner" not in reply.data for reply in await other.option(LIST))
        await leave(other)
        clear = await WireClient.connect(stage.path)
        assert (await clear.option(GO, name_and_infos(b"inner")))[-1].kind == Reply.ERR_UNKNOWN
        await leave(clear)

    play(story)


def test_a_renewed_certificate_counts_from_the_next_connection_on(
    play: Play, stage: Stage, pki: Pki, tmp_path: Path
) -> None:
    """Attached clients stay; a renewal that cannot be used changes nothing; nothing is restarted."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(name: str) -> None:
        for source, target in zip(pki.issue(name, file="renewed"), (certificate, key), strict=True):
            source.replace(target)

    put("localhost")
    stage.config = replace(stage.config, tls=TlsConfig(mode=TlsMode.ON, certificate=certificate, key=key))

    async def served_name(stage: Stage) -> object:
        client = await WireClient.connect(stage.path)
        context = pki.client_context()
        context.check_hostname = False
        await start_tls(client, context)
        peer = client.writer.get_extra_info("ssl_object").getpeercert()
        await leave(client)
        return peer["subject"][0][0][1]

    async def story(stage: Stage) -> None:
        attached = await attach(stage, pki.client_context())
        assert await served_name(stage) == "localhost"
        put("renewed.example")
        assert await served_name(stage) == "renewed.example"
        certificate.write_text("no certificate")
        assert await served_name(stage) == "renewed.example"
        certificate.unlink()
        assert await served_name(stage) == "renewed.example"
        assert await attached.read(0, 512) == bytes(512)
        await leave(attached)

    play(story)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_silence_in_the_tls_handshake_ends_at_the_deadline(play: Play, secure: Secure, sent: bytes) -> None:
    """Nothing at all, or the first bytes of a ClientHello."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        client.send(sent)
        assert await client.at_end()
        assert stage.server.handshake_failures["timeout"] == 1
        await leave(client)

    play(story, Limits(handshake_seconds=0.05))


def test_silence_behind_the_tls_handshake_ends_at_the_deadline(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
        with pytest.raises(ssl.SSLError):
            await hand.read(1)
        assert stage.server.handshake_failures["timeout"] == 1
        await leave(hand.client)

    play(story, Limits(handshake_seconds=0.2))


def test_no_tls_at_all_behind_starttls_is_a_counted_failure(play: Play, secure: Secure) -> None:
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        await client.reader.read()
        assert stage.server.handshake_failures["tls"] == 1
        await leave(client)

    play(story)


def test_end_of_file_without_close_notify_still_gets_what_was_asked(play: Play, secure: Secure, pki: Pki) -> None:
    """libnbd closes its socket without a word when its user is in a hurry. Complete writes count, half ones do not."""
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
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
        hand = await by_hand(stage, pki.client_context())
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
        hand = await by_hand(stage, pki.client_context())
        reads = b"".join(request(READ, 0, MIB, cookie=cookie) for cookie in range(4))
        hand.client.send(hand.encrypt(GO_DISK + reads + request(DISC, 0, 0)))
        replies = await hand.read(GO_REPLIES + 4 * (16 + MIB) + 1)
        assert len(replies) == GO_REPLIES + 4 * (16 + MIB)
        assert await hand.client.at_end()
        await leave(hand.client)

    play(story)


def test_a_connection_that_ended_leaves_nothing_to_the_garbage_collector(play: Play, secure: Secure, pki: Pki) -> None:
    """Channel and protocol hold each other; if both stayed until the collector comes, a crowd would cost megabytes."""
    secure()

    async def story(stage: Stage) -> None:
        other = await attach(stage, pki.client_context())
        for _ in range(3):
            client = await attach(stage, pki.client_context())
            assert await client.read(0, 512) == bytes(512)
            await leave(client)
            stranger = await WireClient.connect(stage.path)
            assert (await stranger.option(STARTTLS))[-1].kind == Reply.ACK
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            await stranger.reader.read()
            await leave(stranger)
        while stage.server.connections > 1:
            assert await other.read(0, 512) == bytes(512)
        kinds = (Connection, Attached, TlsChannel)
        assert sorted(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds)) == [
            "Attached",
            "TlsChannel",
        ]
        await leave(other)

    gc.collect()
    gc.disable()
    try:
        play(story)
    finally:
        gc.enable()


def test_a_forged_record_ends_the_connection_and_changes_nothing(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
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
        client = await attach(stage, pki.client_context())
        client.ask(READ, 0, 1 << 20, cookie=3)
        other = await attach(stage, pki.client_context())
        draining = asyncio.ensure_future(stage.server.drain())
        assert await client.answer(read_length=1 << 20) == (3, ANY)
        assert await client.at_end()
        assert await other.at_end()
        await draining
        await leave(client)
        await leave(other)

    play(story)


def test_a_crowd_of_tiny_records_takes_turns_with_other_clients(play: Play, secure: Secure, pki: Pki) -> None:
    """When somebody else's request is answered, a client that sent 8,000 records before it is not yet through."""
    secure()
    flushes = 280

    async def story(stage: Stage) -> None:
        other = await attach(stage, pki.client_context())
        hand = await by_hand(stage, pki.client_context())
        hand.client.send(hand.encrypt(GO_DISK))
        await hand.read(GO_REPLIES)
        storm = b"".join(hand.encrypt(bytes([byte])) for byte in request(FLUSH, 0, 0) * flushes)
        hand.client.send(storm)
        assert await other.read(0, 512) == bytes(512)
        assert stage.disk.traffic.operations()["flush"].requests < flushes // 2
        assert len(await hand.read(16 * flushes)) == 16 * flushes
        await leave(hand.client)
        await leave(other)

    play(story)


def test_what_came_before_the_end_of_file_is_answered_in_later_turns(play: Play, secure: Secure, pki: Pki) -> None:
    secure()
    count = 280

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
        hand.client.send(hand.encrypt(GO_DISK))
        await hand.read(GO_REPLIES)
        hand.client.send(b"".join(hand.encrypt(bytes([byte])) for byte in request(FLUSH, 0, 0) * count))
        hand.client.writer.write_eof()
        assert len(await hand.read(16 * count + 1)) == 16 * count
        await leave(hand.client)

    play(story)


def test_a_peer_that_sends_on_and_on_before_tls_stands_is_cut(
    play: Play, secure: Secure, caplog: pytest.LogCaptureFixture
) -> None:
    """A ClientHello of nearly the length that OpenSSL takes, most of it in records of one byte."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        hello = b"\x01\x01\xff\xf0\x03\x03" + bytes(1 << 16)
        pieces = (hello[:64], *(bytes([byte]) for byte in hello[64:]))
        with contextlib.suppress(OSError):
            client.send(b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces))
            await client.reader.read()
        assert stage.server.handshake_failures["tls"] == 1
        assert "before TLS stands" in caplog.text
        await leave(client)

    play(story)


def test_only_tls_1_2_and_newer(certificate: tuple[Path, Path]) -> None:
    context = make_context(TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=certificate[1]))
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def with_file(config: TlsConfig, key: str, path: Path) -> TlsConfig:
    changed: dict[str, Any] = {key: path}
    return replace(config, **changed)


@pytest.mark.parametrize("wrong", ["certificate", "key", "client_ca"])
def test_a_file_that_cannot_be_used_is_named(certificate: tuple[Path, Path], tmp_path: Path, wrong: str) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    config = TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=certificate[1])
    with pytest.raises(ConfigError, match=r"junk\.pem"):
        TlsFiles(with_file(config, wrong, junk))
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        TlsFiles(with_file(config, wrong, tmp_path / "missing.pem"))


@pytest.mark.parametrize("style", [0, 1])
def test_what_comes_behind_go_is_served_however_much_it_is(play: Play, secure: Secure, pki: Pki, style: int) -> None:
    """More than the handshake takes at once, and then silence: the rest lies in OpenSSL, not in the socket."""
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage, pki.client_context())
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


def test_the_server_does_not_end_before_the_last_replies_have_left(play: Play, secure: Secure, pki: Pki) -> None:
    """The session has given all to TLS and is gone; what the socket did not take is with the transport."""
    secure()

    async def story(stage: Stage) -> None:
        for size in range(64 << 10, 2 * MIB, 32 << 10):  # one of these ends in what the socket just does not take
            hand = await by_hand(stage, pki.client_context())
            hand.client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            hand.client.send(hand.encrypt(GO_DISK + request(READ, 0, size) + request(DISC, 0, 0)))
            while not stage.server.sessions:  # noqa: ASYNC110
                await asyncio.sleep(0)
            (attached,) = stage.server.sessions
            while not attached.session.requests:  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            if attached.closed.done() and stage.server.closing:
                break
            hand.client.writer.transport.abort()
            await attached.closed
        else:
            pytest.fail("no reply was ever left with the transport")
        ending = asyncio.create_task(stage.server.drain())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not ending.done()
        hand.client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await hand.read(GO_REPLIES + 16 + size + 1)) == GO_REPLIES + 16 + size
        await leave(hand.client)
        await ending

    play(story)


@pytest.mark.parametrize("command", ["end", "abort"])
def test_a_client_that_is_cut_in_a_stream_of_large_writes_takes_nobody_with_it(
    play: Play, secure: Secure, pki: Pki, command: str
) -> None:
    secure()

    async def story(stage: Stage) -> None:
        other = await attach(stage, pki.client_context())
        for _ in range(5):
            hand = await by_hand(stage, pki.client_context())
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
