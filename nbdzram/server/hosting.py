"""What all connections of one server share: the exports, the limits, the workers, the counters."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

from nbdzram.config import ServerConfig
from nbdzram.machine import Machine
from nbdzram.nbd.handshake import Failure, Policy
from nbdzram.server.channel import Receiver
from nbdzram.server.exports import Exports
from nbdzram.server.outlet import Scratch
from nbdzram.server.tls import TlsFiles
from nbdzram.server.turns import Turns
from nbdzram.server.workers import Budget, Workers, keep_memory, release_memory

if TYPE_CHECKING:
    from nbdzram.server.connection import Connection
    from nbdzram.server.session import Session

log = logging.getLogger("nbdzram.server")

WORKERS_MOST = 64
"""More threads than one loop feeds; with those of asyncio (at most 32) they fit into the unit's TasksMax."""

STATUS_QUERIES = 2
"""Long BLOCK_STATUS requests looked at together: each holds a megabyte or two of Python objects."""

REST_SECONDS = 1.0
"""A connection that was quiet for so long gets a small receive buffer again."""

RELEASE_SECONDS = 1.0
"""After a connection ended, its freed buffers go back to the system: once for all that end together."""


class Hosting:
    """Made by NbdServer; lives on its event loop."""

    def __init__(self, exports: Exports, config: ServerConfig) -> None:
        keep_memory()
        self.loop = asyncio.get_running_loop()
        self.exports = exports
        self.limits = config.limits
        self.tls = TlsFiles(config.tls)
        self.policy = Policy(
            tls=config.tls.mode,
            list_exports=config.list_exports,
            option_limit=config.limits.handshake_options,
            payload_limit=config.limits.payload_bytes,
        )
        self.budget = Budget(config.limits.total_bytes)
        self.workers = Workers(min(Machine().processors(), WORKERS_MOST))
        self.scratch = Scratch()
        self.turns = Turns()
        self.receiver = Receiver()
        self.haggling: set[Connection] = set()
        self.sessions: set[Session] = set()
        self.accepted = 0
        self.attached = 0
        self.protocol_errors = 0
        self.handshake_failures: Counter[Failure] = Counter()
        self.shutting_down = False
        self.status_slots = asyncio.Semaphore(STATUS_QUERIES)
        self._release: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.loop.add_reader(self.workers.fileno(), self.workers.collect)

    @property
    def connections(self) -> int:
        """Open ones, in the handshake or attached."""
        return len(self.haggling) + len(self.sessions)

    def begin(self, connection: Connection) -> None:
        """A connection was accepted."""
        self.haggling.add(connection)
        self._quiet.clear()

    def promote(self, connection: Connection, session: Session) -> None:
        """Its handshake is done: the session goes on."""
        self.haggling.discard(connection)
        self.sessions.add(session)
        if self._rest is None:
            self._rest = self.loop.call_later(REST_SECONDS, self._rest_sessions)

    def number_session(self) -> int:
        """A number for one more attached client, by which the operator names it: in their order, never used again."""
        self.attached += 1
        return self.attached

    def end(self, member: Connection | Session) -> None:
        """It is gone."""
        self.haggling.discard(member)
        self.sessions.discard(member)
        if self._release is None:
            self._release = self.loop.call_later(RELEASE_SECONDS, self._release_memory)
        if not self.connections:
            self._quiet.set()

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
        self.loop.remove_reader(self.workers.fileno())
        self.workers.stop()

    def _rest_sessions(self) -> None:
        self.turns.watch()
        for session in self.sessions:
            session.rest()
        self._rest = self.loop.call_later(REST_SECONDS, self._rest_sessions) if self.sessions else None

    def _release_memory(self) -> None:
        self._release = None
        release_memory()
