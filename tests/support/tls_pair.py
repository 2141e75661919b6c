"""The server's end of TLS, and Python's ssl at the other end of a socket pair, on one thread."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

from nbdzram.sessions.tls import TlsLine
from nbdzram.sessions.tls_context import TlsContext

RECORD = 16 << 10
"""Plain bytes of one record at most (RFC 8446, section 5.1)."""


class Pair:
    """Our line, and Python's ssl at the other end, on one thread: nothing moves but by a test's own steps."""

    def __init__(self, context: TlsContext, trust: ssl.SSLContext, *, hurried: bool = False) -> None:
        ours, self.socket = socket.socketpair()
        for end in (ours, self.socket):
            end.setblocking(False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trust.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        early = b""
        if hurried:  # its hello comes before TLS begins here
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
            early = self._outgoing.read()
        self.line = TlsLine(ours.detach(), context, early)

    def shake_hands(self) -> None:
        """Until TLS stands at both ends."""
        shaking, waiting = self.shaking(), True
        for _ in range(10):
            waiting = waiting and not self.line.handshake()
            if shaking() and not waiting:
                return
        raise AssertionError("the handshake does not end")

    def shaking(self) -> Callable[[], bool]:
        """A step of the client's handshake: whether it stands."""
        done = False

        def step() -> bool:
            nonlocal done
            done = done or self._try(self.tls.do_handshake)
            return done

        return step

    def say_hello(self) -> None:
        """The first that the client says, and nothing is read."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.flush()

    def _try(self, step: Callable[[], object]) -> bool:
        with contextlib.suppress(ssl.SSLWantReadError):
            step()
            self.flush()
            return True
        self.flush()
        self.fetch()
        return False

    def flush(self) -> None:
        """Send what the client has to say."""
        waiting = self._outgoing.read()
        if waiting:
            self.socket.setblocking(True)
            self.socket.sendall(waiting)
            self.socket.setblocking(False)

    def fetch(self) -> None:
        """Take what has come from the server."""
        with contextlib.suppress(BlockingIOError):
            while came := self.socket.recv(1 << 20):
                self._incoming.write(came)

    def send_in_two(self, plain: bytes, first_bytes: int) -> Callable[[], None]:
        """The beginning of one record; what is given sends the rest of it."""
        self.tls.write(plain)
        record = self._outgoing.read()
        self.socket.sendall(record[:first_bytes])
        return lambda: self.socket.sendall(record[first_bytes:])

    def send(self, *records: bytes) -> None:
        """A record each."""
        for record in records:
            self.tls.write(record)
        self.flush()

    def receive(self) -> bytes:
        """What has come to the client, up to the end."""
        plain = bytearray()
        while True:
            self.fetch()
            try:
                part = self.tls.read(RECORD)
            except ssl.SSLWantReadError:
                return bytes(plain)
            if not part:
                return bytes(plain)
            plain += part

    def forge(self, size: int) -> bytes:
        """A record of zeroes, with one bit turned."""
        self.tls.write(bytes(size))
        forged = bytearray(self._outgoing.read())
        forged[-20] ^= 1
        return bytes(forged)

    def close(self) -> None:
        """Both ends."""
        self.socket.close()
        self.line.close(orderly=False)
