"""What all connections of one server share: the exports, the limits, the workers, the counters."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nbdzram.config import ServerConfig
from nbdzram.machine import Machine
from nbdzram.nbd.handshake import Failure, Policy
from nbdzram.server.descriptors import places, raise_limit
from nbdzram.server.exports import Export, Exports, Served
from nbdzram.server.handover import Client, Counted
from nbdzram.server.lobby import Guest, Lobby, Origin
from nbdzram.server.syncs import Syncs
from nbdzram.server.tls import TlsFiles
from nbdzram.sessions.budget import release_memory
from nbdzram.sessions.plane import Plane
from nbdzram.sessions.session import Session
from nbdzram.status import ClientStatus

if TYPE_CHECKING:
    from nbdzram.sessions.plane import Notice

log = logging.getLogger("nbdzram.server")

PROCESSORS_MOST = 32
"""Large WRITEs are spread over so many at most; with the I/O threads (16, unless the operator says otherwise) and those
of asyncio (at most 32) they fit into the unit's TasksMax."""

THREADS_BY_DEFAULT = 16
"""I/O threads, where there are as many processors: each costs half a megabyte."""

KEPT_PLACES = 16
"""The last places for attached clients, at most an eighth of all: for a source, and half of them for a listener, with
less than FEW clients, and that half for certificates too. However many one client attaches, another one gets in, and so
does a local socket's; however many come in from anywhere without a certificate, one who has it gets in beside them."""

FEW = 4

REST_SECONDS = 1.0
"""A connection that was quiet for so long gets a small receive buffer again."""

HAGGLING_BUFFER_SIZE = 16 << 10
"""Bytes taken from a socket at once while haggling; one buffer a server, empty between two wake-ups."""

RELEASE_SECONDS = 1.0
"""After a connection ended, its freed buffers go back to the system: once for all that end together."""


class Haggling(Guest, Protocol):
    """A connection from accept to the end of its handshake (connection.py)."""

    @property
    def spoke(self) -> bool:
        """Something was heard of it."""

    def shut_down(self) -> None:
        """Attach to nothing any more."""

    def abort(self) -> None:
        """End."""


class Hosted(Served, Protocol):
    """An attached client (attached.py); what its thread has to tell comes to Hosting, and from there to it."""

    @property
    def number(self) -> int:
        """By which the operator names it."""

    @property
    def export(self) -> Export:
        """To which it is attached."""

    @property
    def session(self) -> Session:
        """Which serves it."""

    @property
    def carried(self) -> Client | None:
        """What was released of it."""

    @property
    def busy(self) -> bool:
        """Requests of it are under way."""

    @property
    def stands_still(self) -> bool:
        """It waits for its client, and has for a while."""

    @property
    def still_seconds(self) -> float:
        """For how long."""

    @property
    def waits_for_room(self) -> bool:
        """Others must be done before it can go on."""

    def status(self) -> ClientStatus:
        """What the server tells of it."""

    def begin(self) -> None:
        """Be served."""

    def release(self) -> None:
        """As drain, but stay connected, for another process to serve."""

    def refused(self, notice: Notice) -> None:
        """Hear that a request was refused, or failed."""

    def ended(self) -> None:
        """Hear why it ends."""

    def wants_sync(self) -> None:
        """Hear that answers wait for the disk."""

    def gone(self) -> None:
        """Hear that nothing of it is under way any more."""


class Hosting:
    """Made by NbdServer; lives on its event loop."""

    def __init__(
        self, exports: Exports, config: ServerConfig, syncs: Syncs | None = None, tls: TlsFiles | None = None
    ) -> None:
        """`tls`: the files, if they were read before, whatever lies there now."""
        self.loop = asyncio.get_running_loop()
        self.exports = exports
        self.limits = config.limits
        self.tls = tls or TlsFiles(config.tls)
        self.policy = _policy(config)
        processors = Machine().processors()
        self.plane = Plane(
            config.threads or min(processors, THREADS_BY_DEFAULT),
            min(processors, PROCESSORS_MOST),
            config.limits.total_bytes,
        )
        self.syncs = syncs or Syncs()
        self.places = places(config.limits.connections, raise_limit())
        self.lobby = Lobby(self.places.haggling, self.loop.call_soon)
        self.haggling: set[Haggling] = set()
        self.haggling_buffer = bytearray(HAGGLING_BUFFER_SIZE)
        self.attached: dict[int, Hosted] = {}  # by their numbers
        self.origins: dict[int, Origin] = {}  # of attached clients, the same
        self._attached_from: Counter[str] = Counter()  # by source, and by listener
        self.accepted = 0
        self._numbers = itertools.count(1)
        self.protocol_errors = 0
        self.handshake_failures: Counter[Failure] = Counter()
        self.shutting_down = False
        self._release: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._notices_dropped = 0
        self.loop.add_reader(self.plane.fileno(), self._collect)

    def go_on_from(self, counted: Counted) -> None:
        """Count on from what another process did; clients get numbers that none had. Before anybody is attached."""
        self.accepted, self.protocol_errors = counted.accepted, counted.protocol_errors
        self.handshake_failures.update(
            {cause: counted.handshake_failures[cause] for cause in Failure if cause in counted.handshake_failures}
        )
        self._numbers = itertools.count(counted.last_client + 1)

    def counted(self) -> Counted:
        """The same of our own."""
        return Counted(
            accepted=self.accepted,
            protocol_errors=self.protocol_errors,
            handshake_failures={str(cause): count for cause, count in self.handshake_failures.items()},
            last_client=next(self._numbers) - 1,
        )

    def adopt(self, config: ServerConfig, tls: TlsFiles | None) -> None:
        """Other limits and TLS files, for whoever connects from now on. None: the files in use stay."""
        self.tls, self.limits, self.policy = tls or self.tls, config.limits, _policy(config)
        self.places = places(config.limits.connections, raise_limit())
        self.lobby.places = self.places.haggling

    @property
    def connections(self) -> int:
        """Open ones, in the handshake or attached."""
        return len(self.haggling) + len(self.attached)

    def begin(self, connection: Haggling) -> None:
        """A connection was accepted."""
        self.haggling.add(connection)
        self._quiet.clear()
        self.lobby.enter(connection)

    def no_place_for(self, origin: Origin) -> str:
        """Why nobody from there can be attached now; empty: there is a place."""
        limit, count = self.places.attached, len(self.attached)
        free, kept = limit - count, min(KEPT_PLACES, limit // 8)
        if free <= 0:
            return f"more than {limit} connections"
        if free <= kept and self._attached_from[origin.source] >= FEW:
            return f"{count} of {limit} connections: the last {kept} are not for {origin.source}, which has its share"
        if free <= kept // 2 and self._attached_from[origin.listener] >= FEW and not origin.certified:
            return f"{count} of {limit} connections: the last {kept // 2} are for other listeners, or a certificate"
        return ""

    def promote(self, connection: Haggling, attached: Hosted) -> None:
        """Its handshake is done: it is attached, and goes on."""
        self.haggling.discard(connection)
        self.lobby.leave(connection)
        self.enlist(attached, connection.origin)

    def enlist(self, attached: Hosted, origin: Origin) -> None:
        """It is attached, and goes on."""
        self._quiet.clear()
        self.attached[attached.number] = attached
        self.origins[attached.number] = origin
        self._attached_from.update((origin.listener, origin.source))
        attached.begin()
        if self._rest is None:
            self._rest = self.loop.call_later(REST_SECONDS, self._rest_sessions)

    def number_client(self) -> int:
        """A number for one more attached client, by which the operator names it: in their order, never used again."""
        return next(self._numbers)

    def end_haggling(self, connection: Haggling) -> None:
        """It is gone, or was promoted before."""
        self.haggling.discard(connection)
        self.lobby.leave(connection)
        self._end()

    async def wait_quiet(self) -> None:
        """Until no connection is open."""
        await self._quiet.wait()

    def fail_handshake(self, cause: Failure) -> None:
        """Count a handshake that ended without an export."""
        self.handshake_failures[cause] += 1

    def stop(self) -> None:
        """End the workers. No connection is open."""
        assert not self.connections
        if self._release is not None:
            self._release.cancel()
        if self._rest is not None:
            self._rest.cancel()
        self._collect()
        self.loop.remove_reader(self.plane.fileno())
        self.plane.stop()
        self.syncs.close()

    def _end(self) -> None:
        if self._release is None:
            self._release = self.loop.call_later(RELEASE_SECONDS, self._release_memory)
        if not self.connections:
            self._quiet.set()

    def _rest_sessions(self) -> None:
        self.plane.rest()
        self._rest = self.loop.call_later(REST_SECONDS, self._rest_sessions) if self.attached else None

    def _collect(self) -> None:
        """Hear what the threads have to tell."""
        tidings, notices = self.plane.collect()
        for notice in notices:
            if attached := self.attached.get(notice[0]):
                self._heed(attached.refused, notice)
        if dropped := self.plane.notices.dropped - self._notices_dropped:
            log.warning("%d refused requests are not in the log: they came faster than it is written", dropped)
            self._notices_dropped += dropped
        for session, ended, sync, gone in tidings:
            attached = self.attached[session.number]
            if ended:
                self._heed(attached.ended)
            if sync:
                self._heed(attached.wants_sync)
            if gone:
                self._bury(attached, session)

    def _heed(self, hear: Callable[..., None], *told: object) -> None:
        """What is told is told once: a mistake of ours in one client's tidings must not lose those of others."""
        try:
            hear(*told)
        except Exception as error:  # noqa: BLE001
            self.loop.call_exception_handler({"message": "what a client's thread told", "exception": error})

    def _bury(self, attached: Hosted, session: Session) -> None:
        """It is gone, and nothing is under way for it."""
        self._heed(attached.gone)
        self.plane.bury(session)
        del self.attached[attached.number]
        listener, source, _ = self.origins.pop(attached.number)
        self._attached_from.subtract((listener, source))
        self._attached_from += Counter()  # forget who has none
        self._end()

    def _release_memory(self) -> None:
        self._release = None
        self.plane.budget.empty()
        release_memory()


def _policy(config: ServerConfig) -> Policy:
    return Policy(
        tls=config.tls.mode,
        list_exports=config.list_exports,
        option_limit=config.limits.handshake_options,
        payload_limit=config.limits.payload_bytes,
    )
