"""A minimal blocking NBD client: fixed newstyle, GO, simple replies, over TLS if asked.

For servers that are processes of their own. Its sibling in the event loop, and why there are two: tests.wire.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.wire import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    GREETING,
    IHAVEOPT,
    INFO_EXPORT,
    NBDMAGIC,
    OPT_GO,
    OPT_STARTTLS,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_INFO,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    client_hello,
    name_and_infos,
    option,
    request,
)

Address = Path | tuple[str, int]

# Requests sent before the first reply is read: deep enough to keep a server busy, shallow enough that neither side's
# socket buffer fills with something the other waits for.
DEPTH = 16
PIECE = 256 * 1024


class RequestFailed(Exception):
    """The server answered with an error number of the protocol."""

    def __init__(self, error: int) -> None:
        super().__init__(f"NBD error {error}")
        self.error = error


class RefusedOption(Exception):
    """The server answered an option with an error reply."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(f"option refused with {reply:#x}: {text}")
        self.reply = reply


def open_socket(address: Address, *, timeout: float = 30.0) -> socket.socket:
    if isinstance(address, Path):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(str(address))
        return connection
    connection = socket.create_connection(address, timeout=timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Client:
    """One connection in transmission, or, with export=None, still haggling.

    With `tls` everything behind STARTTLS is encrypted; the server's certificate must be one for `localhost`.
    """

    def __init__(self, address: Address, export: str | None, *, tls: ssl.SSLContext | None = None) -> None:
        self.socket = open_socket(address)
        self.size_bytes = 0
        self.transmission_flags = 0
        self._cookie = 0
        try:
            self._greet()
            if tls is not None:
                self.ask_for_tls()
                self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
            if export is not None:
                self.go(export)
        except BaseException:
            self.socket.close()
            raise

    def _greet(self) -> None:
        magic, option_magic, flags = GREETING.unpack(self.receive(GREETING.size))
        assert magic == NBDMAGIC
        assert option_magic == IHAVEOPT
        assert flags & 1, "the server does not speak fixed newstyle"
        self.socket.sendall(client_hello(flags & 3))

    def ask_for_tls(self) -> None:
        """STARTTLS, up to the server's consent: the next byte is TLS's. Raises RefusedOption."""
        self.send_option(OPT_STARTTLS)
        reply, body = self.option_reply(OPT_STARTTLS)
        if reply != REP_ACK:
            raise RefusedOption(reply, body.decode(errors="replace"))

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes; EOFError when the server hangs up first."""
        received = bytearray(count)
        view = memoryview(received)
        while view:
            size = self.socket.recv_into(view)
            if size == 0:
                raise EOFError(f"the server hung up with {len(view)} of {count} bytes to come")
            view = view[size:]
        return bytes(received)

    def send_option(self, number: int, body: bytes = b"") -> None:
        self.socket.sendall(option(number, body))

    def option_reply(self, number: int) -> tuple[int, bytes]:
        magic, answered, reply, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
        assert magic == OPTION_REPLY_MAGIC
        assert answered == number
        return reply, self.receive(length)

    def go(self, export: str) -> None:
        """Enter transmission. Raises RefusedOption, after which haggling goes on."""
        self.send_option(OPT_GO, name_and_infos(export.encode()))
        while True:
            reply, body = self.option_reply(OPT_GO)
            if reply == REP_ACK:
                return
            if reply != REP_INFO:
                raise RefusedOption(reply, body.decode(errors="replace"))
            if struct.unpack(">H", body[:2])[0] == INFO_EXPORT:
                self.size_bytes, self.transmission_flags = struct.unpack(">QH", body[2:])

    def send(self, command: int, offset: int, length: int, payload: bytes | memoryview = b"", flags: int = 0) -> int:
        """Send one request without waiting; returns its cookie."""
        self._cookie += 1
        self.socket.sendall(request(command, offset, length, flags=flags, cookie=self._cookie))
        if payload:
            self.socket.sendall(payload)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """The next reply's error and cookie; a read's payload is still to be received."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self.receive(SIMPLE_REPLY.size))
        assert magic == SIMPLE_REPLY_MAGIC, f"reply magic {magic:#x}"
        return error, cookie

    def call(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
        """Send one request and wait for its reply. Raises RequestFailed."""
        cookie = self.send(command, offset, length, payload, flags)
        error, answered = self.reply()
        assert answered == cookie
        if error:
            raise RequestFailed(error)
        return self.receive(length) if command == CMD_READ else b""

    def read(self, offset: int, length: int) -> bytes:
        return self.call(CMD_READ, offset, length)

    def write(self, offset: int, payload: bytes) -> None:
        self.call(CMD_WRITE, offset, len(payload), payload)

    def trim(self, offset: int, length: int) -> None:
        self.call(CMD_TRIM, offset, length)

    def flush(self) -> None:
        self.call(CMD_FLUSH, 0, 0)

    def write_all(self, image: Iterable[bytes]) -> None:
        """Write the pieces one behind the other from offset 0, DEPTH of them in flight."""
        pending = 0
        offset = 0
        for piece in image:
            self.send(CMD_WRITE, offset, len(piece), piece)
            offset += len(piece)
            pending += 1
            if pending == DEPTH:
                self._expect_done()
                pending -= 1
        for _ in range(pending):
            self._expect_done()

    def _expect_done(self) -> None:
        error, _ = self.reply()
        if error:
            raise RequestFailed(error)

    def read_all(self, piece_bytes: int = PIECE) -> Iterator[bytes]:
        """The whole export, in order."""
        for offset in range(0, self.size_bytes, piece_bytes):
            yield self.read(offset, min(piece_bytes, self.size_bytes - offset))

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.send(CMD_DISC, 0, 0)
        self.close()
