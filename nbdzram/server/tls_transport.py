"""TLS while its client haggles: to Connection what a socket's transport is, over the line that a thread takes over.

    STARTTLS ─> handshake steps ─> options ─> detach: the line is a session's       or close, abort, lost

Each step, a piece of the handshake or what one receive brings, is taken when the Lobby says so; meanwhile nothing is
read. The line is touched by the event loop alone until `detach` gives it away, whole: nothing watches its socket then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from nbdzram.errors import TlsError
from nbdzram.sessions.tls import TlsLine


class Above(Protocol):
    """Who haggles: some of asyncio.BufferedProtocol's methods, and how TLS began."""

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where the next plain bytes go."""

    def buffer_updated(self, nbytes: int) -> None:
        """Plain bytes came there."""

    def pause_writing(self) -> None:
        """The peer does not read."""

    def resume_writing(self) -> None:
        """It reads again."""

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over. Nothing is told after this."""

    def tls_established(self, names: frozenset[str]) -> None:
        """The peer has proved what it had to, and that its certificate has these names; plain bytes follow."""

    def tls_failed(self, error: Exception) -> None:
        """TLS could not begin. The alert for the peer is sent; close now."""

    def expel(self, reason: str) -> None:
        """TLS cannot go on, or the peer costs more than it may: cut the connection."""


class TlsTransport:
    """See the module's docstring."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: TlsLine,
        above: Above,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._loop = loop
        self._line: TlsLine | None = line  # None: given away, or closed
        self._fd = line.fileno()
        self._above = above
        self._call_soon = call_soon
        self._pending = bytearray()  # plain bytes that wait for the socket
        self._established = False
        self._paused = False
        self._closing = False
        self._scheduled = False
        self._schedule()  # what came behind STARTTLS may be all there is to begin with

    # ---- what Connection calls, with asyncio.Transport's meaning ----

    def write(self, plain: bytes) -> None:
        """Encrypt and send; what the peer does not take waits, and is told as pause_writing."""
        if self._line is None or self._closing:
            return
        self._pending += plain
        if len(self._pending) == len(plain):
            self._send()
            if self._pending and not self._closing:
                self._above.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Plain bytes that wait for the socket."""
        return len(self._pending)

    def pause_reading(self) -> None:
        """Deliver no bytes, and take none from the socket."""
        self._paused = True
        if self._line is not None:
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Read on."""
        self._paused = False
        self._read_on()

    def close(self) -> None:
        """Send what is queued, say close_notify, and close; the peer's close_notify is not waited for."""
        if self._line is not None and not self._closing:
            self._closing = True
            self._loop.remove_reader(self._fd)
            if not self._pending:
                self._finish()

    def abort(self) -> None:
        """Cut the connection."""
        self._end(None, orderly=False)

    @property
    def line(self) -> TlsLine:
        """What a session may have, from `detach` on."""
        assert self._line is not None
        return self._line

    def detach(self) -> None:
        """The line is somebody else's. Nothing is queued on it."""
        assert not self._pending
        self._leave()

    # ---- inwards ----

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._step)

    def _step(self) -> None:
        """Our turn among those that haggle."""
        self._scheduled = False
        if self._line is None or self._closing:
            return
        if not self._established:
            self._shake_hands(self._line)
        elif not self._paused:
            self._receive(self._line)

    def _shake_hands(self, line: TlsLine) -> None:
        try:
            self._established = line.handshake()
        except TlsError as error:
            self._above.tls_failed(error)
        except EOFError:
            self._end(None, orderly=False)
        except OSError as error:
            self._end(error, orderly=False)
        else:
            if self._established:
                self._above.tls_established(line.names())
            if line.waits_to_write and not self._established:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._read_on()

    def _receive(self, line: TlsLine) -> None:
        try:
            size = line.receive(self._above.get_buffer(-1))
        except TlsError as error:
            self._above.expel(str(error))
        except OSError as error:
            self._end(error, orderly=False)
        else:
            if size == 0:
                self._end(None, orderly=True)
            elif size is None:
                self._read_on()
            else:
                self._above.buffer_updated(size)
                self._read_on()

    def _read_on(self) -> None:
        if self._line is None or self._paused or self._closing:
            return
        if self._line.holds_more:
            self._schedule()
        else:
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        self._loop.remove_reader(self._fd)
        self._schedule()

    # ---- outwards ----

    def _writable(self) -> None:
        self._loop.remove_writer(self._fd)
        if not self._established:
            self._schedule()
        elif self._pending:
            self._send()
            if not self._pending and not self._closing and self._line is not None:
                self._above.resume_writing()
        elif self._closing:
            self._finish()

    def _send(self) -> None:
        assert self._line is not None
        try:
            with memoryview(self._pending) as waiting:
                sent = self._line.send(waiting)
        except OSError as error:
            self._pending.clear()
            self._closing = True  # whoever writes is told by connection_lost, and not in the middle of it
            self._loop.call_soon(self._lose, error)
            return
        del self._pending[:sent]
        if self._pending:
            self._loop.add_writer(self._fd, self._writable)
        elif self._closing:
            self._finish()

    def _finish(self) -> None:
        """Everything was given."""
        assert self._line is not None
        if self._line.say_goodbye():
            self._end(None, orderly=True)
        else:
            self._loop.add_writer(self._fd, self._writable)

    # ---- the end ----

    def _lose(self, error: OSError) -> None:
        self._end(error, orderly=False)

    def _end(self, error: Exception | None, *, orderly: bool) -> None:
        line = self._line
        if line is not None:
            self._leave()
            line.close(orderly=orderly)
            self._loop.call_soon(self._above.connection_lost, error)

    def _leave(self) -> None:
        """The loop no longer watches the socket: its number may be another's the next moment."""
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._line = None
