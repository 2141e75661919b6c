"""A client for servers that run in the test's own event loop: every reply style, whatever the test wants to say.

Its blocking sibling, and why there are two: tests.wire.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field
from typing import Self

from tests.wire import (
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REPLY_MAGIC,
    FLAG_PAYLOAD_LEN,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    OptionReply,
    client_hello,
    name_and_infos,
    name_and_queries,
    option,
    request,
)


@dataclass(slots=True)
class Answer:
    """One request's whole reply."""

    error: int = 0
    text: str = ""
    failed_at: int | None = None
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    content: bytes = b""


class WireClient:
    """One connection. `style`: 0 simple, 1 structured, 2 extended, as negotiated."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.style = 0
        self.size = 0
        self.flags = 0

    @classmethod
    async def connect(cls, path: str, *, client_flags: int | None = 3) -> Self:
        """Connect to a unix socket and shake hands up to the client flags (None: send none)."""
        return await cls.over(await asyncio.open_unix_connection(path), client_flags=client_flags)

    @classmethod
    async def over(
        cls, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], *, client_flags: int | None = 3
    ) -> Self:
        """The same on a connection that there is."""
        reader, writer = streams
        client = cls(reader, writer)
        assert GREETING.unpack(await reader.readexactly(GREETING.size)) == (NBDMAGIC, IHAVEOPT, 3)
        if client_flags is not None:
            client.send(client_hello(client_flags))
        return client

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def option(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and take replies up to the final one."""
        self.send(option(number, data))
        replies = []
        while True:
            magic, answered, kind, size = OPTION_REPLY.unpack(await self.reader.readexactly(OPTION_REPLY.size))
            assert magic == OPTION_REPLY_MAGIC
            assert answered == number
            replies.append(OptionReply(answered, kind, await self.reader.readexactly(size)))
            if kind == REP_ACK or replies[-1].failed:
                return replies

    async def go(self, name: bytes = b"disk", *, style: int = 1, contexts: tuple[bytes, ...] = ()) -> Self:
        """Settle the style and contexts, then enter the transmission phase."""
        if style:
            assert (await self.option({1: OPT_STRUCTURED_REPLY, 2: OPT_EXTENDED_HEADERS}[style]))[-1].kind == REP_ACK
        if contexts:
            assert (await self.option(OPT_SET_META_CONTEXT, name_and_queries(name, *contexts)))[-1].kind == REP_ACK
        replies = await self.option(OPT_GO, name_and_infos(name))
        assert replies[-1].kind == REP_ACK, replies
        _, self.size, self.flags = struct.unpack(">HQH", replies[0].data)
        self.style = style
        return self

    def ask(
        self,
        command: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        cookie: int = 1,
        payload: bytes = b"",
    ) -> None:
        if self.style == 2 and payload:
            flags |= FLAG_PAYLOAD_LEN
        self.send(request(command, offset, length, flags=flags, cookie=cookie, extended=self.style == 2))
        self.send(payload)

    async def answer(self, *, read_length: int = 0, offset: int = 0) -> tuple[int, Answer]:
        """Take one request's reply: (cookie, answer). `read_length`: what a simple reply to READ carries."""
        magic = int.from_bytes(await self.reader.readexactly(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", await self.reader.readexactly(12))
            plain = b"" if error else await self.reader.readexactly(read_length)
            return cookie, Answer(error=error, content=plain)
        answer = Answer()
        content = bytearray(read_length)
        covered = 0
        while True:
            flags, kind, cookie, payload = await self._chunk(magic)
            answer.chunks.append((kind, payload))
            if kind == 1:
                at = int.from_bytes(payload[:8]) - offset
                content[at : at + len(payload) - 8] = payload[8:]
                covered += len(payload) - 8
            elif kind == 2:
                covered += int.from_bytes(payload[8:12])
            elif kind & 0x8000:
                answer.error, text_size = struct.unpack(">IH", payload[:6])
                answer.text = payload[6 : 6 + text_size].decode()
                if kind == 0x8002:
                    answer.failed_at = int.from_bytes(payload[6 + text_size :])
            if flags & 1:
                assert answer.error or covered == read_length, "the chunks do not cover the request"
                answer.content = bytes(content)
                return cookie, answer
            magic = int.from_bytes(await self.reader.readexactly(4))

    async def _chunk(self, magic: int) -> tuple[int, int, int, bytes]:
        if magic == EXTENDED_REPLY_MAGIC:
            flags, kind, cookie, _, size = struct.unpack(">HHQQQ", await self.reader.readexactly(28))
        else:
            assert magic == STRUCTURED_REPLY_MAGIC
            flags, kind, cookie, size = struct.unpack(">HHQI", await self.reader.readexactly(16))
        return flags, kind, cookie, await self.reader.readexactly(size)

    async def call(self, command: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b"") -> Answer:
        """One request and its answer."""
        self.ask(command, offset, length, flags=flags, payload=payload)
        _, answer = await self.answer(read_length=length if command == CMD_READ else 0, offset=offset)
        return answer

    async def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        answer = await self.call(CMD_READ, offset, length, flags=flags)
        assert answer.error == 0, answer.text
        return answer.content

    async def write(self, offset: int, content: bytes) -> None:
        answer = await self.call(CMD_WRITE, offset, len(content), payload=content)
        assert answer.error == 0, answer.text

    async def at_end(self) -> bool:
        """The server closes the connection and sends nothing more.

        Under TLS the stream's end is close_notify. The client's transport answers it, and may find that the server,
        which need not wait for the answer (section 6.1 of RFC 8446), has closed the socket: the end stood before.
        """
        try:
            return await self.reader.read(1) == b""
        except BrokenPipeError:
            return self.reader.at_eof()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()
