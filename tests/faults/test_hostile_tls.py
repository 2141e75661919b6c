"""The same ill will over TLS: what a crowd costs when every byte of it is encrypted, and what only TLS makes possible.

As in test_hostile: a real server with its default limits, many connections, and three questions. How far did the
server grow, was somebody else served meanwhile, and is everything given back when the crowd is gone?
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

import pytest

from tests.faults.crowd import (
    LONG,
    MIB,
    STORED,
    Crowd,
    Watch,
    drain,
    drip,
    expect_others_are_served,
    half_a_write,
    reads,
)
from tests.support.nbd_client import Client
from tests.support.openssl import OpenSslClient
from tests.support.server import Nbdzram
from tests.wire import (
    CMD_READ,
    CMD_WRITE,
    OPT_GO,
    REP_ACK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    name_and_infos,
    option,
    request,
    split_option_replies,
)

T = TypeVar("T")
GO_REPLIES = 20 + 12 + 20  # INFO_EXPORT and ACK

RECORD_LIMIT = 1 << 14
"""Plain bytes of one record at most (RFC 8446, section 5.1): what a peer can make the server wait for."""


@pytest.mark.parametrize(("count", "length"), [(1, LONG), (30, LONG), (300, MIB), (1000, MIB)])
def test_reads_that_are_never_read_back(
    secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd, count: int, length: int
) -> None:
    """64 reads in flight on each of `count` connections, and nobody takes a reply."""
    watch = Watch(secured)
    crowd.attach(secured, count, tcp=count < 300, tls=trust)
    crowd.press([reads(64, length)] * count)
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_writes_that_stop_half_way(secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd) -> None:
    """64 clients announce 32 MiB for places of their own, send half of them, and wait."""
    watch = Watch(secured)
    crowd.attach(secured, 64, tls=trust)
    content = random.Random(7).randbytes(MIB)
    crowd.press([half_a_write(64 * MIB + n * (LONG // 4), LONG, content) for n in range(64)])
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_left()
    with Client(secured.unix_path, "disk", tls=trust) as witness:
        witness.trim(64 * MIB, 900 * MIB)
    watch.expect_recovered()


def test_a_reset_with_replies_outstanding(secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd) -> None:
    """The connection breaks by RST while 64 long reads are encrypted for it, again and again."""
    watch = Watch(secured)
    for _ in range(5):
        crowd.attach(secured, 4, tcp=True, tls=trust)
        crowd.press([reads(64, LONG)] * 4)
        crowd.disperse(reset=True)
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    watch.expect_recovered()


def test_silence_in_the_tls_handshake_ends_with_the_deadline(
    impatient_secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd
) -> None:
    """Behind STARTTLS, inside the ClientHello, and with the server's half done: nobody stays, and nothing of them."""
    watch = Watch(impatient_secured)
    hello = client_hello_of_tls(trust)
    for said in (b"", hello[:1], hello[:3], hello[:-1], hello):
        for _ in range(20):
            client = behind_starttls(impatient_secured)
            client.socket.sendall(said)
            crowd.members.append(client.socket)
    for member in crowd.members:
        drain(member)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()
    with Client(impatient_secured.unix_path, "disk", tls=trust) as other:
        assert other.read(0, 512) == bytes(512)


def test_a_byte_a_time_does_not_extend_the_deadline(impatient_secured: Nbdzram, trust: ssl.SSLContext) -> None:
    """The deadline is for the whole handshake, TLS included: whoever drips a ClientHello is cut in the middle of it."""
    client = behind_starttls(impatient_secured)
    client.socket.settimeout(0.01)
    hello = client_hello_of_tls(trust)
    assert not all(drip(client.socket, hello[at : at + 1]) for at in range(len(hello)))
    client.close()


def test_silence_in_the_middle_of_a_record_harms_nobody(secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd) -> None:
    """200 clients send all of a record of the longest kind but its last byte: they stay, and stay small."""
    watch = Watch(secured)
    for _ in range(200):
        client = ByHand(secured, trust)
        record = client.encrypt(request(CMD_WRITE, 0, RECORD_LIMIT) + bytes(RECORD_LIMIT))[: RECORD_LIMIT + 5]
        client.socket.sendall(record)
        crowd.members.append(client.socket)
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


@pytest.mark.parametrize("begun", [0, 13, 28 + 2048], ids=["between requests", "in a header", "in a payload"])
def test_end_of_file_without_close_notify(secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd, begun: int) -> None:
    """Whether the socket ends between requests or inside one: what was complete is answered, the rest never was."""
    watch = Watch(secured)
    session = request(CMD_READ, 0, 512, cookie=7) + (request(CMD_WRITE, 0, 4096, cookie=8) + bytes(4096))[:begun]
    clients = [ByHand(secured, trust) for _ in range(50)]
    crowd.members += [client.socket for client in clients]
    for client in clients:
        client.socket.sendall(client.encrypt(session))
        client.socket.shutdown(socket.SHUT_WR)
    for client in clients:
        assert client.read(1 << 16) == reply_to_read(STORED[:512])
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_end_of_file_in_the_middle_of_a_record_is_the_end(
    secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd
) -> None:
    """Half a record authenticates nothing: no byte of it is taken for a request."""
    watch = Watch(secured)
    for _ in range(50):
        client = ByHand(secured, trust)
        client.socket.sendall(client.encrypt(request(CMD_READ, 0, 512))[:-1])
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read(1) == b""
        crowd.members.append(client.socket)
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_a_thousand_connections(secured: Nbdzram, trust: ssl.SSLContext, crowd: Crowd) -> None:
    """Attached, used and idle again, they stay small; all are served."""
    watch = Watch(secured)
    crowd.attach(secured, 1000, tls=trust)
    for member in crowd.members:
        member.sendall(request(CMD_WRITE, 0, 60_000, cookie=7) + STORED[:60_000])
        assert receive(member, 16) == reply_to_read(b"")
    for member in crowd.members:
        member.sendall(request(CMD_READ, 0, 60_000, cookie=7))
    for member in crowd.members:
        assert receive(member, 16 + 60_000) == reply_to_read(STORED[:60_000])
    expect_others_are_served(secured, tls=trust)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_records_without_data_end_the_connection(secured: Nbdzram, trust: ssl.SSLContext) -> None:
    """A client that updates its keys for ever is cut; one that does so now and then is served."""
    client = OpenSslClient(behind_starttls(secured).socket)
    client.socket.sendall(client.encrypt(option(OPT_GO, name_and_infos(b"disk"))))
    client.read(GO_REPLIES)
    content = STORED[: 64 * 1024]
    for cookie in range(50):
        asked = request(CMD_WRITE, 0, len(content), cookie=cookie) + content
        client.socket.sendall(client.key_update() + client.encrypt(asked))
        assert client.read(16) == reply_to_read(b"", cookie=cookie)
    with contextlib.suppress(OSError):
        client.socket.sendall(b"".join(client.key_update() for _ in range(200)))
    drain(client.socket)
    secured.wait_until(lambda: "TLS records without data" in secured.log, 30)
    client.socket.close()
    expect_others_are_served(secured, tls=trust)


def test_strangers_cannot_update_their_keys_for_ever_either(secured: Nbdzram, trust: ssl.SSLContext) -> None:
    client = OpenSslClient(behind_starttls(secured).socket)
    with contextlib.suppress(OSError):
        client.socket.sendall(b"".join(client.key_update() for _ in range(200)))
    drain(client.socket)
    secured.wait_until(lambda: "TLS records without data" in secured.log, 30)
    client.socket.close()
    expect_others_are_served(secured, tls=trust)


def receive(member: socket.socket, size: int) -> bytes:
    """Exactly so many bytes, of which a record holds a part."""
    received = b""
    while len(received) < size and (part := member.recv(size - len(received))):
        received += part
    return received


def behind_starttls(server: Nbdzram) -> Client:
    """The server has said yes to STARTTLS, and waits for a ClientHello."""
    client = Client(server.unix_path, None)
    client.ask_for_tls()
    return client


def client_hello_of_tls(context: ssl.SSLContext) -> bytes:
    said = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said, server_hostname="localhost").do_handshake()
    return said.read()


def reply_to_read(content: bytes, *, cookie: int = 7) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + content


class ByHand:
    """An attached client that holds its own ciphertext, so that a test can cut it where it likes."""

    def __init__(self, server: Nbdzram, context: ssl.SSLContext) -> None:
        self.socket = behind_starttls(server).socket
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._wait(self._tls.do_handshake)
        self.socket.sendall(self.encrypt(option(OPT_GO, name_and_infos(b"disk"))))
        replies = self.read(GO_REPLIES)
        assert split_option_replies(replies)[-1].kind == REP_ACK

    def encrypt(self, plain: bytes) -> bytes:
        """Plain bytes as the records that carry them."""
        view = memoryview(plain)
        while view:
            view = view[self._tls.write(view) :]
        return self._outgoing.read()

    def read(self, size: int) -> bytes:
        """`size` plain bytes, or what there is up to the server's close_notify. AssertionError without one."""
        plain = b""
        while len(plain) < size and (part := self._wait(lambda: self._tls.read(size))):
            plain += part
        return plain

    def _wait(self, step: Callable[[], T]) -> T:
        """Do `step`, and fetch what it needs from the server."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self.socket.sendall(self._outgoing.read())
                ciphertext = self.socket.recv(1 << 16)
                assert ciphertext, "the server hung up without close_notify"
                self._incoming.write(ciphertext)
