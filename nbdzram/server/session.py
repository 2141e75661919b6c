"""A client attached to an export: what the hot path leaves to Python.

Errors and their explanations, BLOCK_STATUS, and the end of the connection, in its several forms.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from nbdzram.errors import ProtocolError
from nbdzram.nbd.constants import Command, ReplyStyle, TransmissionFlag
from nbdzram.nbd.handshake import Terms
from nbdzram.nbd.options import text_bytes
from nbdzram.nbd.transmission import error_reply
from nbdzram.nbd.verdicts import Asked, Verdict, error_of, explain
from nbdzram.server.hotpath import STATUS_INLINE_LIMIT, UNFRAGMENTED_LIMIT, HotPath, Stage
from nbdzram.server.status import (
    DESCRIPTOR_LIMIT,
    STRAINED_DESCRIPTOR_LIMIT,
    StatusRequest,
    parse_status,
    status_reply,
)
from nbdzram.status import ClientStatus

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
        self._sync = hosting.syncs.of(export.disk.pool.path)
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
            syncs=self._sync is not None,
        )
        self.export = export
        self.peer = peer
        self.number = hosting.number_session()
        self.since = time.time()
        self.closed = hosting.loop.create_future()
        self._hosting = hosting
        self._terms = terms
        self._error_count = 0
        self._transport: Any = None
        self._left = False
        self._linger: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, transport: Any, *, rest: bytes) -> None:
        """Take the connection over from the handshake; `rest`: bytes that came behind its last option."""
        self._transport = transport
        self.export.connections.add(self)
        self.attach(transport, transport.get_extra_info("socket").fileno(), rest)

    @property
    def read_only(self) -> bool:
        """What the client was told when it attached."""
        return bool(self._terms.flags & TransmissionFlag.READ_ONLY)

    def status(self) -> ClientStatus:
        """What the server tells of it, at this moment."""
        return ClientStatus(
            number=self.number,
            peer=self.peer.text,
            certificate_names=tuple(sorted(self.peer.certificate_names)),
            export=self.export.name,
            read_only=self.read_only,
            since=self.since,
            requests=self.requests,
            in_flight=self.in_flight,
            idle_seconds=self.idle_seconds,
        )

    # ---- what the transport calls, beyond HotPath ----

    def eof_received(self) -> bool:
        """The peer sends no more. What it asked for completely is still answered."""
        self._left = True
        self.drain()
        return self.stage < Stage.CLOSING

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing can be sent any more; tasks under way come back and are dropped."""
        if self.stage == Stage.OPEN and self.midway:
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
        if self.stage == Stage.LOST and not self.busy:
            self.move(Stage.GONE)
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
        self._log_error(text)
        if judged not in (Verdict.POOL_FULL, Verdict.UNREADABLE) or asked.command not in _OFFSET_ERRORS:
            failed_at = None
        elif failed_at is None:
            failed_at = asked.offset
        error = error_of(judged, asked.command)
        return error_reply(self._terms.style, asked.cookie, asked.offset, error, text_bytes(text), failed_at)

    def report(self, error: BaseException) -> None:
        """A mistake of ours ended this connection: as loud as what asyncio itself catches."""
        self._hosting.loop.call_exception_handler({"message": f"{self._who}: not answered", "exception": error})

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
            self._later(self._query_later(request, started))

    def answer_when_synced(self, asked: Asked, reply: bytes, started: int | None) -> None:
        """Send `reply` once what was stored is on the disk below. `started`: nobody has counted the request yet."""
        self._later(self._answer_when_synced(asked, reply, started))

    def protocol_error(self, error: ProtocolError) -> None:
        """The peer broke the protocol: end the connection."""
        log.warning("%s: %s; disconnecting", self._who, error)
        self._hosting.protocol_errors += 1
        self.halt()

    def drained(self) -> None:
        """Everything is answered: let the last replies out, for LINGER_SECONDS at most, then close."""
        if not self.move(Stage.CLOSING):
            return
        if self._left and self.midway:
            log.warning("%s: the client went away in the middle of a request", self._who)
        self._transport.close()
        self._linger = self._hosting.loop.call_later(LINGER_SECONDS, self.abort)

    # ---- for the server, beside `drain` ----

    def abort(self) -> None:
        """Cut the connection."""
        if self.stage < Stage.LOST:
            self._transport.abort()

    # ---- for the server, beside `drain` ----

    def go_on_soon(self) -> None:
        """Our turn to store a large payload as it arrives has come."""
        self._hosting.loop.call_soon(self.proceed)

    def expel(self, reason: str) -> None:
        """Cut a connection that holds others up."""
        log.warning("%s: %s; disconnecting", self._who, reason)
        self.move(Stage.CLOSING)
        self.abort()

    # ---- parts ----

    @property
    def _who(self) -> str:
        return f"{self.peer.text} on export {self.export.name!r}"

    @property
    def _descriptor_limit(self) -> int:
        return STRAINED_DESCRIPTOR_LIMIT if self.strained else DESCRIPTOR_LIMIT

    def _log_error(self, text: str) -> None:
        self._error_count += 1
        if self._error_count <= LOGGED_ERRORS:
            log.warning("%s: %s", self._who, text)

    def _count(self, verdict: Verdict, length: int, started: int) -> None:
        self.count_request(Command.BLOCK_STATUS, verdict, length, time.monotonic_ns() - started)

    def _later(self, answering: Coroutine[Any, Any, None]) -> None:
        """Something slow of ours, which takes itself off `pending` again."""
        self.pending += 1
        task = self._hosting.loop.create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_when_synced(self, asked: Asked, reply: bytes, started: int | None) -> None:
        assert self._sync is not None
        verdict = Verdict.OK
        try:
            await self._sync.synced()
        except OSError:
            verdict = Verdict.NOT_SYNCED
            reply = self.explain_failure(verdict, asked, None)
        finally:
            self.pending -= 1
        if started is not None:
            self.count_request(asked.command, verdict, asked.length, time.monotonic_ns() - started)
        if self.stage < Stage.LOST:
            self.emit(reply)
            self.proceed()
        self.gone()

    async def _query_later(self, request: StatusRequest, started: int) -> None:
        reply = None
        try:
            async with self._hosting.status_slots:
                if self.stage < Stage.LOST:  # or else nobody waits for it
                    style = ReplyStyle(self._terms.style)
                    limit = self._descriptor_limit
                    reply = await asyncio.to_thread(status_reply, self.disk, style, request, limit)
        finally:
            self.pending -= 1
        if reply is not None and self.stage < Stage.LOST:
            self._count(Verdict.OK, request.length, started)
            self.emit(reply)
            self.proceed()
        self.gone()
