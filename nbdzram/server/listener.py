"""The NBD server: listening sockets, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nbdzram.config import ServerConfig, TlsConfig, TlsMode
from nbdzram.errors import UserError
from nbdzram.listening import close_all
from nbdzram.nbd.constants import TransmissionFlag
from nbdzram.nbd.handshake import Failure, Terms
from nbdzram.server.attached import STILL_SECONDS, Attached
from nbdzram.server.connection import Connection
from nbdzram.server.exports import Export, Exports, Served
from nbdzram.server.handover import Client, Counted, Handover
from nbdzram.server.hosting import Hosted, Hosting
from nbdzram.server.lobby import Origin, origin_of
from nbdzram.server.sockets import (
    BACKLOG,
    FamilyLacking,
    as_the_loop_takes_it,
    inherited,
    open_tcp,
    open_unix,
    open_vsock,
    set_bounds,
    uri_of,
)
from nbdzram.server.syncs import Syncs
from nbdzram.server.tls import TlsFiles
from nbdzram.sessions.line import SocketLine
from nbdzram.status import ThreadStatus

log = logging.getLogger("nbdzram.server")

HANDSHAKE_GRACE_SECONDS = 0.5
"""How long connections in the handshake may still ask for their ERR_SHUTDOWN while the server drains; and for how long
one of which nothing was heard is waited for before a takeover."""

HAGGLING_SECONDS = 3.0
"""How long one of which something was heard is waited for before a takeover, while all others are served: to and fro
six times, over any network. It attaches, and goes over like others; cut off, its client would see an error."""

REST_SECONDS = 3.0
"""For how long a client that is handed over may take to come to rest, and once more to be drained: one that goes on,
and is slow. All others wait as long, but for nobody who stood still before."""

STOPPED_SECONDS = 1.5
"""Who stops in the moment of a takeover is cut after so long, in the middle of a payload or of answers that he does not
read: he could do nothing more when drained. TCP sends again what was lost after 0.2, 0.6 and 1.4 s: so it is not for a
packet, nor three in a row."""

LOOK_SECONDS = 0.05
"""How often is looked who stands still. Those that come to rest are heard of at once."""


class NbdServer:
    """Serves `exports` at the addresses of `config`. Use on one event loop: start, ..., drain."""

    def __init__(self, exports: Exports, config: ServerConfig, syncs: Syncs | None = None) -> None:
        """`syncs`: what FLUSH waits for, if that is more than the arenas' disks."""
        self.exports = exports
        self._syncs = syncs
        self._config = config
        self._hosting: Hosting | None = None
        self._counted = Counted()  # of one that has ended
        self._servers: list[asyncio.Server] = []
        self._listeners: list[socket.socket] = []
        self._spare_listeners: list[socket.socket] = []  # the same sockets again, that outlive the servers
        self._uris: list[str] = []
        self._paths: list[tuple[Path, int]] = []

    async def start(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        handed: Handover | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Listen: on sockets handed over by another process (`handed`, with its clients), or in `environment`
        (LISTEN_FDS), or else on the configured addresses.

        `ready` is called when nothing else can fail any more, and nothing of any client handed over has been read:
        until then the other process can go on with them, and from then on it never does.
        Raises UserError for an address that cannot be used, ConfigError for unusable TLS files.
        """
        assert self._hosting is None
        if handed is not None:
            listeners = list(handed.listeners)
        else:
            listeners = inherited(os.environ if environment is None else environment) or self._open()
        try:
            tls = None if handed is None else handed.tls
            self._hosting = hosting = Hosting(self.exports, self._config, self._syncs, tls)
        except BaseException:
            close_all(listeners)
            raise
        self._listeners = listeners  # all of them: who asks to take over while we wait below is given each
        for listener in listeners:
            listener.setblocking(False)
            set_bounds(listener)
            self._uris.append(uri_of(listener, self._config.tls.mode))
            self._servers.append(await _accept_on(listener, hosting, self._uris[-1]))
        carried: list[tuple[Attached, Origin]] = []
        if handed is not None:
            hosting.go_on_from(handed.counted)
            names = dict(zip(handed.uris, self._uris, strict=True))
            found = [self._carry_on(client, names) for client in handed.clients]
            carried = [one for one in found if one is not None]
        if ready is not None:
            ready()
        if handed is not None:
            self._paths = list(handed.paths)  # ours to remove from now on: whoever fails before leaves them
        for attached, origin in carried:
            hosting.enlist(attached, origin)

    @property
    def uris(self) -> list[str]:
        """Where it listens, as NBD URIs without an export name."""
        return list(self._uris)

    @property
    def lets_in(self) -> bool:
        """Clients are served, or what they began is answered."""
        return self._hosting is not None

    @property
    def connections(self) -> int:
        """Open ones, in the handshake or attached."""
        return self._hosting.connections if self._hosting else 0

    @property
    def connections_accepted(self) -> int:
        """Since the start."""
        return (self._hosting or self._counted).accepted

    @property
    def handshake_failures(self) -> dict[str, int]:
        """Handshakes that ended without an export, by cause; every cause is there."""
        counted = (self._hosting or self._counted).handshake_failures
        return {str(cause): counted.get(cause, 0) for cause in Failure}

    @property
    def protocol_errors(self) -> int:
        """Connections ended in the transmission phase because the peer broke the protocol."""
        return (self._hosting or self._counted).protocol_errors

    @property
    def tls_files_usable(self) -> bool:
        """Whether the TLS files on disk are those in use."""
        return self._hosting is None or self._hosting.tls.usable

    @property
    def certificate_expires_at(self) -> float | None:
        """When the server's certificate ends, in seconds since the epoch; None without one."""
        return self._hosting.tls.expires_at if self._hosting else None

    @property
    def sessions(self) -> list[Hosted]:
        """The attached clients, in the order in which they attached."""
        return list(self._hosting.attached.values()) if self._hosting else []

    def threads(self) -> tuple[ThreadStatus, ...]:
        """The threads that serve clients; their longest turns are those since this was last asked."""
        plane = self._hosting.plane if self._hosting else None
        return tuple(
            ThreadStatus(desk.number, desk.sessions, desk.busy_seconds(), desk.longest_turn_seconds())
            for desk in (plane.threads if plane else ())
        )

    def renew_certificates(self) -> None:
        """Read TLS files that changed now, and not only when the next client comes."""
        if self._hosting is not None:
            self._hosting.tls.renew(unchanged_too=True)

    def read_certificates(self, tls: TlsConfig) -> TlsFiles:
        """The files that these settings name. Raises ConfigError."""
        return TlsFiles(tls)

    def adopt(self, config: ServerConfig, tls: TlsFiles | None) -> None:
        """What clients that come from now on are offered and allowed; how TLS is offered stays. `tls`: files that were
        read when the rest was judged, whatever lies there by now; None: those in use stay."""
        assert config.tls.mode is self._config.tls.mode
        self._config = config
        self.exports.default_name = config.default_export
        if self._hosting is not None:
            self._hosting.adopt(config, None if config.tls.mode is TlsMode.OFF else tls)

    async def serve_socket(self, client: socket.socket) -> None:
        """Serve one connected socket (inetd's on stdin, say) until it closes."""
        if self._hosting is None:
            self._hosting = Hosting(self.exports, self._config, self._syncs)
        hosting = self._hosting
        client.setblocking(False)
        set_bounds(client)
        taken = as_the_loop_takes_it(client)
        await hosting.loop.connect_accepted_socket(lambda: Connection(hosting, "standard input"), taken)
        await hosting.wait_quiet()

    def let_go_of_arena(self, path: str | None) -> None:
        """A pool is removed, and nobody is attached to anything that lay there."""
        if self._hosting is not None and path is not None:
            self._hosting.syncs.let_go(path)

    async def detach(self, export: Export) -> None:
        """End the connections of an export to which nobody can attach; its disk is unused when this returns."""
        await self.end(list(export.connections))

    async def end(self, sessions: Sequence[Served]) -> None:
        """Answer what they have under way, close them, and wait until none of them uses its disk any more."""
        for session in sessions:
            session.drain()
        if sessions:
            await self._wait_closed([session.closed for session in sessions])
        for session in sessions:
            session.abort()
        if sessions:  # to wait, and not to gather: who gives up waiting for us must not cancel what a thread will tell
            await asyncio.wait([session.closed for session in sessions])

    async def drain(self) -> None:
        """Stop accepting, answer what was begun, read nothing more, close everything."""
        await self._stop_accepting()
        close_all(self._spare_listeners)
        self._remove_socket_files()
        hosting = self._hosting
        if hosting is None:
            return
        hosting.shutting_down = True
        for connection in list(hosting.haggling):
            connection.shut_down()
        sessions = list(hosting.attached.values())
        for session in sessions:
            session.drain()
        await self._wait_closed([session.closed for session in sessions])
        if hosting.haggling:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hosting.wait_quiet(), HANDSHAKE_GRACE_SECONDS)
        remaining = list(hosting.attached.values())
        if hosting.connections:
            plural = "s are" if hosting.connections > 1 else " is"
            log.info("%d connection%s cut at the end of draining", hosting.connections, plural)
        for session in remaining:
            session.abort()
        for connection in list(hosting.haggling):
            connection.abort()
        await hosting.wait_quiet()
        self._end(hosting)

    def _carry_on(self, client: Client, listeners: Mapping[str, str]) -> tuple[Attached, Origin] | None:
        """A client that another process gave away, and where it came in, by our names of the listeners. None: its disk
        is not there, or smaller, or it would not be admitted, or not for writing, by the rules of this process's
        configuration, and it is hung up on; or TLS is required: nobody who has it is given away."""
        hosting = self._hosting
        assert hosting is not None
        if self._config.tls.mode is TlsMode.REQUIRE:
            log.warning("%s: TLS is required now; disconnecting", client.peer.text)
            os.close(client.connection)
            return None
        export = self.exports.get(client.export) if client.export in self.exports else None
        if export is None or export.size_bytes < client.size_bytes:
            log.warning("%s: the export %r is not what it was; disconnecting", client.peer.text, client.export)
            os.close(client.connection)
            return None
        terms = Terms(offer=export, style=client.style, contexts=client.contexts, flags=client.flags)
        if not export.keeps(client.peer, read_only=bool(client.flags & TransmissionFlag.READ_ONLY)):
            log.warning("%s: the export %r does not admit it any more; disconnecting", client.peer.text, client.export)
            os.close(client.connection)
            return None
        line = SocketLine(client.connection)
        attached = Attached(
            hosting,
            export,
            terms,
            client.peer,
            line=line,
            greeting=b"",
            rest=client.rest,
            number=client.number,
            payload_limit=client.payload_limit,
        )
        attached.since = client.since
        return attached, origin_of(listeners.get(client.listener, ""), client.peer)

    def prepare_to_hand_over(self) -> None:
        """Have what hand_over needs and could be refused: from there on there is no way back. Raises UserError."""
        try:
            while len(self._spare_listeners) < len(self._listeners):
                self._spare_listeners.append(self._listeners[len(self._spare_listeners)].dup())
        except OSError as error:
            raise UserError(
                f"it has no descriptors left: {error.strerror}; raise LimitNOFILE= or `ulimit -n`"
            ) from None

    async def hand_over(self) -> Handover:
        """Accept nobody more, let every client come to rest, and give up what is served without closing it.

        Who is in the handshake has a while to end it. Who does not come to rest in time, as he never reads his
        answers, never sends the rest of a payload, or is behind TLS, is drained, and connects again. Whoever can be
        seen to stand still is waited for first, while all others are served; whoever waits for room goes with them, as
        he would have that as soon as they are gone, and then be in the middle of a payload himself.
        """
        hosting = self._hosting
        assert hosting is not None
        await self._stop_accepting()
        await _let_haggle(hosting)
        if any(session.session.waits_for_peer for session in hosting.attached.values()):
            await asyncio.sleep(STILL_SECONDS)  # others are served meanwhile
        for connection in list(hosting.haggling):
            connection.abort()
        attached = hosting.attached.values()
        still = [session for session in attached if session.stands_still or session.waits_for_room]
        await _bring_to_rest(still, REST_SECONDS)
        others = list(hosting.attached.values())
        await _bring_to_rest(others, STOPPED_SECONDS)
        sessions = sorted(still + others, key=lambda session: session.number)
        await hosting.wait_quiet()
        handed = Handover(
            listeners=self._spare_listeners,
            uris=list(self._uris),
            paths=self._paths,
            clients=[session.carried for session in sessions if session.carried is not None],
            counted=hosting.counted(),
            tls=hosting.tls,
        )
        self._end(hosting)
        return handed

    def _end(self, hosting: Hosting) -> None:
        """No connection is open any more. Who asks what was counted is told as long as we live."""
        self._counted = hosting.counted()
        hosting.stop()
        self._hosting = None

    async def _stop_accepting(self) -> None:
        """Behind this nobody comes any more: whom the loop has accepted already is in the handshake."""
        for server in self._servers:
            server.close()
        close_all(self._listeners)  # the loop closes what it took, and that may be a copy
        await asyncio.sleep(0)  # it tells of those in its next turn

    async def _wait_closed(self, futures: list[asyncio.Future[None]]) -> None:
        if futures:
            await asyncio.wait(futures, timeout=self._config.limits.drain_seconds)

    def _open(self) -> list[socket.socket]:
        listeners: list[socket.socket] = []
        try:
            lacking: list[FamilyLacking] = []
            for tcp in self._config.tcp:
                try:
                    listeners += open_tcp(tcp)
                except FamilyLacking as error:
                    lacking.append(error)
            for unix in self._config.unix:
                listeners.append(open_unix(unix))
                self._paths.append((unix.path.absolute(), unix.path.stat().st_ino))
            listeners += [open_vsock(vsock) for vsock in self._config.vsock]
            if lacking and not listeners:
                raise lacking[0]
            for lack in lacking:
                log.warning("%s", lack)
        except BaseException:
            close_all(listeners)
            self._remove_socket_files()
            raise
        return listeners

    def _remove_socket_files(self) -> None:
        """Remove our own socket files, not one that a successor has put in their place."""
        for path, inode in self._paths:
            with contextlib.suppress(OSError):
                status = path.stat()
                if stat.S_ISSOCK(status.st_mode) and status.st_ino == inode:
                    path.unlink()
        self._paths.clear()


async def _let_haggle(hosting: Hosting) -> None:
    """Until nobody is in the handshake who may still end it."""
    clock = asyncio.get_running_loop().time
    began = clock()
    while True:
        passed = clock() - began
        if all(passed >= (HAGGLING_SECONDS if one.spoke else HANDSHAKE_GRACE_SECONDS) for one in hosting.haggling):
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _bring_to_rest(sessions: Sequence[Hosted], stopped_seconds: float) -> None:
    """Release them; those that are not at rest in time are drained, and then cut. Who stops for `stopped_seconds` is
    cut as soon as nobody goes on."""
    for session in sessions:
        session.release()
    await _wait_for_rest(sessions, stopped_seconds)
    for session in sessions:
        if session.still_seconds >= stopped_seconds:
            session.abort()
        else:
            session.drain()
    await _wait_for_rest(sessions, stopped_seconds)
    for session in sessions:
        session.abort()
    if sessions:
        await asyncio.wait([session.closed for session in sessions])


async def _wait_for_rest(sessions: Sequence[Hosted], stopped_seconds: float) -> None:
    """Until all are at rest, or stand still for so long; REST_SECONDS at most."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + REST_SECONDS
    while True:
        going_on = [
            session.closed
            for session in sessions
            if not session.closed.done() and session.still_seconds < stopped_seconds
        ]
        if not going_on or clock() >= deadline:
            return
        await asyncio.wait(going_on, timeout=min(LOOK_SECONDS, max(0.0, deadline - clock())))


async def _accept_on(listener: socket.socket, hosting: Hosting, uri: str) -> asyncio.Server:
    """Serve whoever connects. A unix socket's file is ours to remove, or systemd's to keep, and never the loop's."""

    def connect() -> Connection:
        return Connection(hosting, uri)

    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return await hosting.loop.create_server(connect, sock=listener, backlog=BACKLOG)
    listener = as_the_loop_takes_it(listener)
    if sys.version_info >= (3, 13):  # from here on the loop removes the file when it stops listening
        return await hosting.loop.create_unix_server(connect, sock=listener, backlog=BACKLOG, cleanup_socket=False)
    return await hosting.loop.create_unix_server(connect, sock=listener, backlog=BACKLOG)
