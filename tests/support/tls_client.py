"""TLS clients for servers that run in the test's own event loop: Python's own, and one whose ciphertext a test cuts."""

from __future__ import annotations

import contextlib
import ssl

from nbdzram.nbd.constants import Reply
from tests.support.loop_client import WireClient
from tests.wire import OPT_GO, OPT_STARTTLS, name_and_infos, option

GO_DISK = option(OPT_GO, name_and_infos(b"disk"))
GO_REPLIES = 20 + 12 + 20
"""Bytes: INFO_EXPORT and ACK."""


async def leave(client: WireClient) -> None:
    """Close a connection that the server may have closed before."""
    with contextlib.suppress(OSError, ssl.SSLError):
        await client.close()


async def start_tls(client: WireClient, context: ssl.SSLContext) -> None:
    assert (await client.option(OPT_STARTTLS))[-1].kind == Reply.ACK
    await client.writer.start_tls(context, server_hostname="localhost")


async def attach(path: str, context: ssl.SSLContext, name: bytes = b"disk", **negotiated: int) -> WireClient:
    client = await WireClient.connect(path)
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


async def by_hand(path: str, context: ssl.SSLContext) -> ByHand:
    client = await WireClient.connect(path)
    assert (await client.option(OPT_STARTTLS))[-1].kind == Reply.ACK
    hand = ByHand(client, context)
    await hand.handshake()
    return hand


def pattern(size: int) -> bytes:
    """Content of which every eight bytes are others."""
    return b"".join(number.to_bytes(8) for number in range(size // 8))
