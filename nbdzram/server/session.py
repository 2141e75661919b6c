"""A client attached to an export: what the hot path leaves to Python.

Errors and their explanations, BLOCK_STATUS, and the end of the connection, in its several forms.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import termios
import time
from typing import TYPE_CHECKING, Any

from nbdzram.errors import ProtocolError
from nbdzram.nbd.constants import Command, ReplyStyle, TransmissionFlag
from nbdzram.nbd.handshake import Terms
from nbdzram.nbd.options import text_bytes
from nbdzram.nbd.transmission import error_reply
from nbdzram.nbd.verdicts import Asked, Verdict, error_of, explain
from nbdzram.server.hotpath import STATUS_INLINE_LIMIT, UNFRAGMENTED_LIMIT, HotPath
from nbdzram.server.status import (
    DESCRIPTOR_LIMIT,
    STRAINED_DESCRIPTOR_LIMIT,
    StatusRequest,
    parse_status,
    status_reply,
)

if TYPE_CHECKING:
    from nbdzram.server.exports import Export, Peer
    from nbdzram.server.hosting import Hosting

log = logging.getLogger("nbdzram.server")

LOGGED_ERRORS = 10
"""Error lines of one connection; a client that errs more often is summed up when it leaves."""

LINGER_SECONDS = 5.0
"""How long a closed connection may take to accept its last replies before it is cut."""

_OFFSET_ERRORS = frozenset({Command.READ, Command.WRITE, Command.TRIM, Command.BLOCK_STATUS})
"""Commands whose failure may be told with its offset (section "Structured reply types", ERROR_OFFSET)."""


class Session(HotPath, asyncio.BufferedProtocol):
    """One connection in the transmission phase."""

    def __init__(self, hosting: Hosting, export: Export, terms: Terms, peer: Peer) -> None:
        HotPath.__init__(
            self,
            disk=export.disk,
            traffic=export.traffic,
            budget=hosting.budget,
            workers=hosting.workers,
            scratch=hosting.scratch,
            turns=hosting.turns,
            style=terms.style,
            read_only=export.read_only,
            context_count=len(terms.contexts),
            payload_limit=hosting.limits.payload_bytes,
            connection_limit=hosting.limits.connection_bytes,
        )
        self.export = export
        self.peer = peer
        self.closed = hosting.loop.create_future()
        self._hosting = hosting
        self._terms = terms
        self._error_count = 0
        self._socket_fd = -1
        self._transport: Any = None
        self._closing = False
        self._linger: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, transport: Any, *, rest: bytes) -> None:
        """Take the connection over from the handshake; `rest`: bytes that came behind its last option."""
        self._transport = transport
        self._socket_fd = transport.get_extra_info("socket").fileno()
        self.export.connections.add(self)
        self.attach(transport, self._socket_fd, rest)

    @property
    def read_only(self) -> bool:
        """What the client was told when it attached."""
        return bool(self._terms.flags & TransmissionFlag.READ_ONLY)

    # ---- what the transport calls, beyond HotPath ----

    def eof_received(self) -> bool:
        """The peer sends no more. What it asked for completely is still answered."""
        if not self.halted and self.midway:
            log.warning("%s: the client went away in the middle of a request", self._who)
        self.halt()
        return not self._closing

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can be sent any more; tasks under way come back and are dropped."""
        if not self.halted and self.midway and not self._closing:
            log.warning("%s: the connection broke in the middle of a request (%s)", self._who, exc or "closed")
        else:
            log.debug("%s: disconnected (%s)", self._who, exc or "closed")
        if self._error_count > LOGGED_ERRORS:
            log.warning("%s: %d more errors", self._who, self._error_count - LOGGED_ERRORS)
        if self._linger is not None:
            self._linger.cancel()  # it would keep us, and what we hold of the budget, until it fires
        self.lose()
        self._transport = None
        self.gone()

    # ---- what HotPath calls ----

    def gone(self) -> None:
        """The connection ends when it is lost and all that was under way has come back: until then the disk is in use,
        and who hangs up and comes again and again leaves no more work behind than the connections allowed at once."""
        if self.lost and not self.busy and not self.closed.done():
            self.export.connections.discard(self)
            self._hosting.end(self)
            self.closed.set_result(None)

    def call_soon(self, callback: Any) -> None:
        """Run `callback` in the loop's next turn."""
        self._hosting.loop.call_soon(callback)

    def explain_failure(self, verdict: int, asked: Asked, failed_at: int | None) -> bytes:
        """The error reply to a request, with a sentence for people; logged."""
        judged = Verdict(verdict)
        limit = self._hosting.limits.payload_bytes
        if judged is Verdict.FRAGMENTED:
            limit = UNFRAGMENTED_LIMIT
        text = explain(judged, asked, size=self.disk.size_bytes, limit=limit)
        self._log_error(judged, text)
        if judged not in (Verdict.POOL_FULL, Verdict.UNREADABLE) or asked.command not in _OFFSET_ERRORS:
            failed_at = None
        elif failed_at is None:
            failed_at = asked.offset
        error = error_of(judged, asked.command)
        return error_reply(self._terms.style, asked.cookie, asked.offset, error, text_bytes(text), failed_at)

    def query_status(self, asked: Asked, payload: bytes | None, started: int) -> None:
        """Answer BLOCK_STATUS; a long range is looked at by a thread."""
        request = parse_status(asked, payload, self._terms.contexts, self.disk.size_bytes)
        if isinstance(request, Verdict):
            self._count(request, asked.length, started)
            self.emit(self.explain_failure(request, asked, None))
        elif request.length <= STATUS_INLINE_LIMIT:
            self.emit(status_reply(self.disk, self._terms.style, request, self._descriptor_limit))
            self._count(Verdict.OK, request.length, started)
        else:
            self.pending += 1
            task = self._hosting.loop.create_task(self._query_later(request, started))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def protocol_error(self, error: ProtocolError) -> None:
        """The peer broke the protocol: end the connection."""
        log.warning("%s: %s; disconnecting", self._who, error)
        self._hosting.protocol_errors += 1
        self.halt_quietly()

    def drained(self) -> None:
        """Everything is answered: close, unless requests are on their way, which get ESHUTDOWN first."""
        if not self.halted and (self.midway or self._unread()):
            return
        self.close()

    # ---- for the server ----

    def drain(self) -> None:
        """Answer what is under way, refuse the rest with ESHUTDOWN, then close."""
        self.draining = True
        self.proceed()

    def close(self) -> None:
        """Let the last replies out, for LINGER_SECONDS at most, then close."""
        if self._closing or self._transport is None:
            return
        self._closing = True
        self._transport.close()
        self._linger = self._hosting.loop.call_later(LINGER_SECONDS, self.abort)

    def abort(self) -> None:
        """Cut the connection."""
        if not self.lost:
            self._transport.abort()

    def go_on_soon(self) -> None:
        """Our turn to store a large payload as it arrives has come."""
        self._hosting.loop.call_soon(self.proceed)

    def expel(self, reason: str) -> None:
        """Cut a connection that holds others up."""
        log.warning("%s: %s; disconnecting", self._who, reason)
        self._closing = True
        self.abort()

    def halt_quietly(self) -> None:
        """Read no more and close when what is under way is answered."""
        self.halt()
        if not self.busy:
            self.close()

    # ---- parts ----

    @property
    def _who(self) -> str:
        return f"{self.peer.text} on export {self.export.name!r}"

    @property
    def _descriptor_limit(self) -> int:
        return STRAINED_DESCRIPTOR_LIMIT if self.strained else DESCRIPTOR_LIMIT

    def _log_error(self, verdict: Verdict, text: str) -> None:
        self._error_count += 1
        if self._error_count <= LOGGED_ERRORS and verdict is not Verdict.SHUTTING_DOWN:
            log.warning("%s: %s", self._who, text)

    def _count(self, verdict: Verdict, length: int, started: int) -> None:
        self.count_request(Command.BLOCK_STATUS, verdict, length, time.monotonic_ns() - started)

    def _unread(self) -> bool:
        """Bytes of the peer wait in the socket."""
        waiting = array.array("i", [0])
        try:
            fcntl.ioctl(self._socket_fd, termios.FIONREAD, waiting)
        except OSError:
            return False
        return waiting[0] > 0

    async def _query_later(self, request: StatusRequest, started: int) -> None:
        reply = None
        try:
            async with self._hosting.status_slots:
                if not self.lost:  # or else nobody waits for it
                    style = ReplyStyle(self._terms.style)
                    limit = self._descriptor_limit
                    reply = await asyncio.to_thread(status_reply, self.disk, style, request, limit)
        finally:
            self.pending -= 1
        if reply is not None and not self.lost:
            self._count(Verdict.OK, request.length, started)
            self.emit(reply)
            self.proceed()
        self.gone()
