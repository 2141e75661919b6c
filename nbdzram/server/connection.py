"""A connection before it is attached to an export: the handshake on a socket, under TLS or not, and its deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import struct
from dataclasses import replace
from typing import Any

from nbdzram.errors import NoSuchExport
from nbdzram.nbd.handshake import Close, Enter, Event, Failure, Handshake, HandshakeError, Send, Upgrade
from nbdzram.server.attached import Attached
from nbdzram.server.exports import Peer, PeerDirectory
from nbdzram.server.hosting import Hosting
from nbdzram.server.lobby import Origin, origin_of
from nbdzram.server.tls_transport import TlsTransport
from nbdzram.sessions.line import SocketLine
from nbdzram.sessions.tls import TlsLine

log = logging.getLogger("nbdzram.server")
attached_log = logging.getLogger("nbdzram.attached")  # told line by line (server/logbook)

_CREDENTIALS = struct.Struct("3i")  # struct ucred, unix(7): pid, uid, gid

SECONDS_A_LISTED = 0.5
"""By how much the deadline moves for each export that a list told: programs that list ask several options of each, one
after the other, over whatever network. Over TCP libnbd takes 0.2 s of each: the last bytes of its LIST_META_CONTEXT are
sent with MSG_MORE, and leave when the kernel's patience ends (tcp(7), TCP_CORK). What that gives a stranger is a place
for longer, of which a newcomer takes it (lobby.py)."""


class Connection(asyncio.BufferedProtocol):
    """From accept to Session. Each step, an option most often, is taken when the Lobby says so, and meanwhile nothing
    is read: what a stranger sends at once waits in its socket."""

    def __init__(self, hosting: Hosting, listener: str) -> None:
        self._hosting = hosting
        self.origin = Origin(listener, "")
        self._peer = Peer("unknown")
        self._handshake = Handshake(PeerDirectory(hosting.exports, self._peer), hosting.policy)
        self._transport: Any = None
        self._tls: TlsTransport | None = None
        self._upgrading = False
        self._paused = False
        self._waiting = False
        self._listed = 0
        self._allowed_seconds = 0.0
        self.spoke = False  # something was heard of it
        self._over = False
        self._entering: Enter | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # ---- what the transport calls ----

    def connection_made(self, transport: Any) -> None:
        """Find a place in the lobby, and greet when it is our turn."""
        self._transport = transport
        self._peer = peer_of(transport)
        self.origin = origin_of(self.origin.listener, self._peer)
        self._handshake = Handshake(PeerDirectory(self._hosting.exports, self._peer), self._hosting.policy)
        self._handshake.shutting_down = self._hosting.shutting_down
        self._hosting.accepted += 1
        self._hosting.begin(self)
        self._set_deadline(self._hosting.limits.handshake_seconds)
        transport.set_write_buffer_limits(high=0)
        self._hosting.lobby.call_soon(self._greet)

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """Where the next bytes go."""
        return self._hosting.haggling_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        if self._over:
            return
        self.spoke = True
        self._handshake.receive(memoryview(self._hosting.haggling_buffer)[:nbytes])
        self._transport.pause_reading()
        self._wait_for_turn()

    def eof_received(self) -> None:
        """The peer is gone: without an export there is nothing to finish."""

    def pause_writing(self) -> None:
        """The peer does not read our replies: it gets no more until it does."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        self._wait_for_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended before it came to an export."""
        if not self._over:
            self._over = True
            self._hosting.fail_handshake(Failure.VANISHED)
            # Who only knocks is a health check or a port scan.
            level = logging.INFO if self.spoke else logging.DEBUG
            log.log(level, "%s: disconnected in the handshake (%s)", self._peer.text, exc or "closed")
        self._cancel_deadline()
        self._transport = self._tls = None  # it holds us as we hold it
        self._hosting.end_haggling(self)

    # ---- what TLS calls ----

    def tls_established(self, names: frozenset[str]) -> None:
        """Haggling begins again, with a peer that may have a certificate."""
        self._peer = replace(self._peer, certificate_names=names)
        if names and not self._over:
            self._hosting.lobby.leave(self)
            self.origin = origin_of(self.origin.listener, self._peer)
            self._hosting.lobby.enter(self)
        self._handshake.tls_started(PeerDirectory(self._hosting.exports, self._peer))

    def tls_failed(self, error: Exception) -> None:
        """No cipher, no certificate, or no TLS at all."""
        self._fail(Failure.TLS, f"TLS: {error}")
        self._transport.close()

    def expel(self, reason: str) -> None:
        """TLS cannot go on, or the peer costs more than it may."""
        self._fail(Failure.TLS, f"TLS: {reason}")
        self._transport.abort()

    # ---- for the server ----

    def give_way(self) -> None:
        """A newcomer needs our place."""
        self._fail(Failure.CONNECTION_LIMIT, f"{len(self._hosting.lobby) + 1} haggle, and a newcomer needs a place")
        self._transport.abort()

    def shut_down(self) -> None:
        """Options get ERR_SHUTDOWN from now on."""
        self._handshake.shutting_down = True

    def abort(self) -> None:
        """Cut the connection."""
        self._over = True
        self._transport.abort()

    # ---- parts ----

    def _greet(self) -> None:
        if not self._over:
            self._transport.write(self._handshake.greeting)

    def _wait_for_turn(self) -> None:
        if not self._waiting and not self._over:
            self._waiting = True
            self._hosting.lobby.call_soon(self._step)

    def _step(self) -> None:
        """Our turn: one event of the handshake, or else what else the peer has to say."""
        self._waiting = False
        if self._paused or self._over:
            return
        try:
            if self._upgrading:
                self._start_tls()
                return
            event, self._entering = self._entering or self._handshake.next_event(), None
            if event is None:
                self._transport.resume_reading()
            else:
                self._act(event)
                self._wait_for_turn()
        except HandshakeError as error:
            self._fail(error.cause, str(error))
            self._transport.close()

    def _act(self, event: Event) -> None:
        match event:
            case Send(reply, complaint):
                if complaint:
                    log.warning("%s: option refused: %s", self._peer.text, complaint)
                self._transport.write(reply)
                self._allow_for_a_list()
            case Close(reply):
                self._over = True
                self._transport.write(reply)
                self._transport.close()
            case Upgrade(reply):
                self._transport.write(reply)
                self._upgrading = True
            case Enter():
                self._enter(event)

    def _enter(self, event: Enter) -> None:
        """Attach the client. Its last reply leaves with those of the session, behind what is still on its way."""
        try:
            export = self._hosting.exports.attachable(event.terms.offer, self._peer)
        except NoSuchExport as error:
            raise HandshakeError(Failure.UNKNOWN_EXPORT, str(error)) from None
        if reason := self._hosting.no_place_for(self.origin):
            raise HandshakeError(Failure.CONNECTION_LIMIT, reason)
        if self._transport.get_write_buffer_size():
            self._entering = event  # the socket is given away: first what it owes
            return
        try:
            attached = Attached(
                self._hosting,
                export,
                event.terms,
                self._peer,
                line=self._tls.line if self._tls else SocketLine(self._descriptor()),
                greeting=event.reply,
                rest=self._handshake.take_rest(),
            )
        except (OSError, MemoryError) as error:  # all descriptors are in use: of the socket, or of the arena to sync
            raise _nothing_left(error) from None
        self._over = True
        self._cancel_deadline()
        if self._tls is None:
            self._transport.abort()  # it closes its descriptor of the socket; ours stays
        else:
            self._tls.detach()
        self._transport = self._tls = None
        attached_log.info("%s: attached to export %r%s", self._peer.text, export.name, _certified(self._peer))
        self._hosting.promote(self, attached)

    def _descriptor(self) -> int:
        """Another one of the socket. Raises OSError when all are in use."""
        return os.dup(self._transport.get_extra_info("socket").fileno())

    def _start_tls(self) -> None:
        """Put TLS between the socket and us (section "STARTTLS"), once the answer has left."""
        assert not self._transport.get_write_buffer_size(), "what waits pauses us"
        self._upgrading = False
        try:
            descriptor = self._descriptor()
            try:
                # Bytes that came behind STARTTLS are TLS's: an option in the clear among them is no TLS record.
                line = TlsLine(descriptor, self._hosting.tls.context(), self._handshake.take_rest())
            except BaseException:
                os.close(descriptor)
                raise
        except (OSError, MemoryError) as error:
            raise _nothing_left(error) from None
        self._transport.set_protocol(asyncio.Protocol())
        self._transport.abort()
        self._transport = self._tls = TlsTransport(self._hosting.loop, line, self, self._hosting.lobby.call_soon)

    def _fail(self, cause: Failure, message: str) -> None:
        if not self._over:
            self._over = True
            self._hosting.fail_handshake(cause)
            log.warning("%s: handshake failed: %s", self._peer.text, message)

    def _allow_for_a_list(self) -> None:
        """Who was told many exports may take longer, once for the longest list."""
        if self._handshake.listed > self._listed:
            self._listed = self._handshake.listed
            self._set_deadline(self._hosting.limits.handshake_seconds + self._listed * SECONDS_A_LISTED)

    def _set_deadline(self, seconds: float) -> None:
        self._cancel_deadline()
        self._allowed_seconds = seconds
        self._deadline = self._hosting.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._fail(Failure.TIMEOUT, f"not finished after {self._allowed_seconds:g} s")
        self._transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


def _nothing_left(error: OSError | MemoryError) -> HandshakeError:
    text = f"nothing left to serve one more client with: {error or 'no memory'}"
    return HandshakeError(Failure.CONNECTION_LIMIT, text)


def _certified(peer: Peer) -> str:
    return f" with the certificate of {', '.join(sorted(peer.certificate_names))}" if peer.certificate_names else ""


def peer_of(transport: Any) -> Peer:
    """Who is at the other end of a fresh transport."""
    family = transport.get_extra_info("socket").family
    name = transport.get_extra_info("peername")
    if family in (socket.AF_INET, socket.AF_INET6) and name:
        host = name[0].partition("%")[0]
        text = f"[{host}]:{name[1]}" if family == socket.AF_INET6 else f"{host}:{name[1]}"
        return Peer(text, ipaddress.ip_address(host))
    if family in (socket.AF_INET, socket.AF_INET6):
        return Peer("a client that is gone already")
    return _client_without_address(transport)


def _client_without_address(transport: Any) -> Peer:
    """Who connected to a unix socket, as the kernel says: several local clients are told apart by it. Or by vsock,
    which the loop takes for a unix socket: a virtual machine, or this one, by its context."""
    try:
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
    except OSError:  # all are in use: it is served all the same
        return Peer("local client", local=True)
    with socket.socket(fileno=descriptor) as peer:
        if peer.family == socket.AF_UNIX:
            pid, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            return Peer(f"unix client (pid {pid}, uid {uid})", local=True, account=f"uid {uid}")
        try:
            context, port, *_ = peer.getpeername()
        except OSError:
            return Peer("a client that is gone already", local=True)
    return Peer(f"vsock client (context {context}, port {port})", local=True, account=f"context {context}")
