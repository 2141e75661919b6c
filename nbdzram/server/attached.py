"""An attached client, as the event loop knows it: who it is, what is told of it, how it is ended.

The session itself is served by a thread (nbdzram.sessions); what it has to tell comes here from Hosting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from typing import TYPE_CHECKING

from nbdzram.nbd.constants import TransmissionFlag
from nbdzram.nbd.handshake import Terms
from nbdzram.nbd.verdicts import Asked, Verdict, explain
from nbdzram.server.exports import Export, Peer
from nbdzram.server.handover import Client
from nbdzram.server.hosting import Hosting
from nbdzram.sessions.answers import LOGGED_ERRORS, UNFRAGMENTED_LIMIT
from nbdzram.sessions.line import Line, SocketLine
from nbdzram.sessions.stage import Ending, Stage
from nbdzram.sessions.tls import MOST_BARREN_RECORDS, TlsLine
from nbdzram.sessions.turns import PACE_BYTES, PACE_SECONDS
from nbdzram.status import ClientStatus

if TYPE_CHECKING:
    from nbdzram.sessions.plane import Notice

log = logging.getLogger("nbdzram.server")

TLS_BYTES = 44 << 10
"""What a TlsLine may hold: over a thousand 21 KiB with OpenSSL 3.0, 17 more with 3.5, and a record now and then."""

STILL_SECONDS = 0.5
"""Whoever neither sends nor reads for so long, in the middle of a payload or an answer, is not about to. Others are
served while we look, and where one is wrong he has a pause that is longer."""

_BROKEN_PROTOCOL = frozenset({Ending.BAD_MAGIC, Ending.LONG_PAYLOAD, Ending.HALF_A_REPLY})

_LACKING = {
    errno.ENOSPC: "the system watches no more connections of this user (sysctl fs.epoll.max_user_watches)",
    errno.ENOMEM: "the system has no memory for its connection",
    errno.ENOBUFS: "the system has no memory for its connection",
}
"""What ends a connection, and is neither the client's doing nor the network's."""


class Attached:
    """One client from the end of its handshake to its last reply."""

    def __init__(
        self,
        hosting: Hosting,
        export: Export,
        terms: Terms,
        peer: Peer,
        *,
        line: Line,
        greeting: bytes,
        rest: bytes,
        number: int | None = None,
        payload_limit: int | None = None,
    ) -> None:
        """`number`: that it had in another process; `payload_limit`: the largest request that it was told there."""
        self.export = export
        self.peer = peer
        self.number = hosting.number_client() if number is None else number
        self.since = time.time()
        self.closed: asyncio.Future[None] = hosting.loop.create_future()
        self.carried: Client | None = None  # once it was released
        self._hosting = hosting
        self._terms = terms
        self._payload_limit = payload_limit or hosting.limits.payload_bytes  # of now: a reload changes it for others
        self._sync = hosting.syncs.of(export.pool_name, export.disk.pool.path)
        self._syncing: asyncio.Task[None] | None = None
        self.session = hosting.plane.attach(
            line,
            number=self.number,
            disk=export.disk,
            tally=export.traffic,
            throttle=export.throttle,
            style=terms.style,
            read_only=export.read_only,
            contexts=terms.contexts,
            payload_limit=self._payload_limit,
            connection_limit=hosting.limits.connection_bytes,
            syncs=self._sync is not None,
            greeting=greeting,
            rest=rest,
            line_bytes=TLS_BYTES if isinstance(line, TlsLine) else 0,
        )
        export.connections.add(self)

    @property
    def read_only(self) -> bool:
        """What the client was told when it attached."""
        return bool(self._terms.flags & TransmissionFlag.READ_ONLY)

    @property
    def busy(self) -> bool:
        """Requests of it are under way."""
        return self.session.in_flight > 0

    @property
    def stands_still(self) -> bool:
        """Its client does neither send the rest of a payload nor read its answers, and has not for a while."""
        return self.still_seconds >= STILL_SECONDS

    @property
    def still_seconds(self) -> float:
        """For how long its client has neither sent of a payload nor read of its answers; 0: it need not."""
        return self.session.idle_seconds if self.session.waits_for_peer else 0.0

    @property
    def waits_for_room(self) -> bool:
        """Nothing is read of its payload before those of others are stored."""
        return self.session.waits_for_room

    def status(self) -> ClientStatus:
        """What the server tells of it, at this moment."""
        return ClientStatus(
            number=self.number,
            peer=self.peer.text,
            certificate_names=tuple(sorted(self.peer.certificate_names)),
            export=self.export.name,
            read_only=self.read_only,
            since=self.since,
            requests=self.session.requests,
            in_flight=self.session.in_flight,
            idle_seconds=self.session.idle_seconds,
        )

    def begin(self) -> None:
        """Let it be served."""
        self._hosting.plane.begin(self.session)

    def go_on(self) -> None:
        """Its export's limits are others than they were. Nothing happens when it is gone."""
        if not self.closed.done():
            self._hosting.plane.go_on(self.session)

    def drain(self) -> None:
        """Read no more of it; answer what it asked for completely, then close. Nothing happens when it is gone."""
        if not self.closed.done():
            self._hosting.plane.drain(self.session)

    def release(self) -> None:
        """As drain, but the connection is not closed: `carried` has it then. One behind TLS is drained."""
        if not self.closed.done():
            encrypted = isinstance(self.session.line, TlsLine)
            (self._hosting.plane.drain if encrypted else self._hosting.plane.release)(self.session)

    def abort(self) -> None:
        """Cut it. Nothing happens when it is gone."""
        if not self.closed.done():
            self._hosting.plane.abort(self.session)

    # ---- what its thread tells, by Hosting ----

    def refused(self, notice: Notice) -> None:
        """A request was refused, or failed."""
        _, verdict, command, flags, offset, length, size = notice
        judged = Verdict(verdict)
        limit = UNFRAGMENTED_LIMIT if judged is Verdict.FRAGMENTED else self._payload_limit
        log.warning(
            "%s: %s", self._who, explain(judged, Asked(command, flags, b"", offset, length), size=size, limit=limit)
        )

    def ended(self) -> None:
        """Why it ends is known."""
        cause = Ending(self.session.ending)
        if cause in _BROKEN_PROTOCOL:
            self._hosting.protocol_errors += 1
        if cause is Ending.BAD_MAGIC:
            log.warning("%s: bad request magic; disconnecting", self._who)
        elif cause is Ending.LONG_PAYLOAD:
            log.warning(
                "%s: a payload of %d bytes: the limit is %d; disconnecting",
                self._who,
                self.session.ending_value,
                self._payload_limit,
            )
        elif cause is Ending.HALF_A_REPLY:
            log.warning("%s: stored bytes do not decode in the middle of a reply; disconnecting", self._who)
        elif cause is Ending.TOO_SLOW:
            log.warning(
                "%s: %d bytes of a payload came in %d s while others wait for room, and %d are asked; disconnecting",
                self._who,
                self.session.ending_value,
                PACE_SECONDS,
                PACE_BYTES,
            )
        elif cause is Ending.BARREN_RECORDS:
            log.warning(
                "%s: %d TLS records without data: at most %d are taken; disconnecting",
                self._who,
                self.session.ending_value,
                MOST_BARREN_RECORDS,
            )
        elif cause is Ending.NO_MEMORY:
            log.error("%s: the system has no memory for its buffers; disconnecting", self._who)
        elif cause is Ending.LINE_BROKE and self.session.ending_value in _LACKING:
            log.error("%s: %s; disconnecting", self._who, _LACKING[self.session.ending_value])

    def wants_sync(self) -> None:
        """Answers of it wait until what was stored is on the disk. One that is lost is told that it need not, which may
        take for ever: nobody hears them.
        """
        plane = self._hosting.plane
        if self.session.stage >= Stage.LOST:
            if self._syncing is not None:
                self._syncing.cancel()
            plane.synced(self.session, plane.syncs_asked(self.session), True)
        elif self._syncing is None:
            self._syncing = self._hosting.loop.create_task(self._synchronise())

    def gone(self) -> None:
        """Nothing of it is under way any more."""
        cause = Ending(self.session.ending)
        if self.session.released:
            self.carried = self._carry()
        if self.session.midway and cause is Ending.LINE_BROKE and self.session.ending_value not in _LACKING:
            reason = os.strerror(self.session.ending_value) if self.session.ending_value else "closed"
            log.warning("%s: the connection broke in the middle of a request (%s)", self._who, reason)
        elif self.session.midway and self.session.left:
            log.warning("%s: the client went away in the middle of a request", self._who)
        else:
            broken = cause is Ending.LINE_BROKE and self.session.ending_value not in (0, errno.EPIPE)
            log.debug(
                "%s: disconnected (%s)", self._who, os.strerror(self.session.ending_value) if broken else "closed"
            )
        if self.session.error_count > LOGGED_ERRORS:
            log.warning("%s: %d more errors", self._who, self.session.error_count - LOGGED_ERRORS)
        self.export.connections.discard(self)
        self.closed.set_result(None)

    def _carry(self) -> Client:
        line = self.session.line
        assert isinstance(line, SocketLine)
        return Client(
            number=self.number,
            export=self.export.name,
            size_bytes=self.session.disk.size_bytes,
            style=self._terms.style,
            contexts=self._terms.contexts,
            flags=self._terms.flags,
            peer=self.peer,
            listener=self._hosting.origins[self.number].listener,
            since=self.since,
            rest=self.session.take_rest(),
            connection=line.detach(),
            payload_limit=self._payload_limit,
        )

    @property
    def _who(self) -> str:
        return f"{self.peer.text} on export {self.export.name!r}"

    async def _synchronise(self) -> None:
        """Sync until no answer waits for one. The session is not gone before it has all its answers."""
        assert self._sync is not None
        plane, answered = self._hosting.plane, 0
        while (asked := plane.syncs_asked(self.session)) > answered:
            failed = False
            try:
                await self._sync.synced()
                failed = self._sync.fails(self.export.disk)
            except OSError:
                failed = True
            except Exception as error:  # noqa: BLE001
                # No thread for it, say: nobody knows of anything on the disk, and who waits is answered all the same.
                failed = True
                self._hosting.loop.call_exception_handler({"message": f"{self._who}: no sync", "exception": error})
            plane.synced(self.session, asked, failed)
            answered = asked
        self._syncing = None
