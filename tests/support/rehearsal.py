"""A session without sockets and without threads: bytes in, bytes out, in any pieces; engine and workers are real."""

from __future__ import annotations

from collections.abc import Iterable

from nbdzram.config import Limits
from nbdzram.engine.pool import Pool
from nbdzram.nbd.constants import MetaContext
from nbdzram.ready import readable
from nbdzram.sessions.plane import Plane
from nbdzram.sessions.rehearsal import RehearsalLine, serve
from nbdzram.sessions.session import Session
from nbdzram.sessions.stage import Stage as Ending
from nbdzram.sessions.tally import Tally
from nbdzram.sessions.thread import Desk
from nbdzram.sessions.throttle import Throttle


class Client:
    """One client of a Stage: what it sends, what it gets, and its session."""

    def __init__(self, line: RehearsalLine, session: Session) -> None:
        self.line = line
        self.session = session

    def send(self, sent: bytes) -> None:
        """Put it where the session finds it at its next turn."""
        self.line.incoming += sent

    @property
    def over(self) -> bool:
        """The session is gone."""
        return self.session.stage >= Ending.GONE


class Stage:
    """One small export, played on again and again; every run starts with the same content."""

    def __init__(
        self, size: int, *, budget: int = 1 << 30, processors: int = 1, mem_limit: int = 0, path: str | None = None
    ) -> None:
        self.pool = Pool(mem_limit=mem_limit, path=path)
        self.content = bytes(range(1, 252)) * (size // 251 + 1)
        self.content = self.content[: size // 2] + bytes(size - size // 2)
        self.disk = self.pool.create("disk", size)
        self.throttle = Throttle()
        self.plane = Plane(1, processors, budget)
        self.desk = Desk(0, self.plane.workers)
        self.clients: dict[int, Client] = {}
        self.tallies: dict[int, Tally] = {}
        self._numbers = 0

    def attach(
        self,
        *,
        style: int,
        contexts: int = 0,
        read_only: bool = False,
        limits: Limits | None = None,
        syncs: bool = False,
        rest: bytes = b"",
    ) -> Client:
        """One more client, at a desk that this thread serves. `rest`: what came of it before."""
        limits = limits or Limits()
        self._numbers += 1
        line = RehearsalLine()
        session = self.plane.attach(
            line,
            number=self._numbers,
            disk=self.disk,
            tally=self.tallies.setdefault(self._numbers, Tally()),
            throttle=self.throttle,
            style=style,
            read_only=read_only,
            contexts=tuple(MetaContext)[:contexts],
            payload_limit=limits.payload_bytes,
            connection_limit=limits.connection_bytes,
            syncs=syncs,
            greeting=b"",
            rest=rest,
            desk=self.desk,
        )
        self.plane.begin(session)
        self.clients[self._numbers] = Client(line, session)
        self.desk.turn()
        return self.clients[self._numbers]

    def serve(self, client: Client, *, alone: bool = False) -> bool:
        """Give a client what its poller would. False: there was nothing."""
        if client.line.ready:
            serve(self.desk, client.session, alone=alone)
            return True
        return False

    def hear(self) -> None:
        """See to what sessions tell."""
        tidings, _ = self.plane.collect()
        for session, _, _, gone in tidings:
            if gone:
                self.clients.pop(session.number, None)
                self.plane.bury(session)

    def settle(self) -> None:
        """Until no session has anything to do."""
        going = True
        while going:
            going = sum(map(self.serve, self.clients.values())) > 0
            while readable(self.desk.fileno(), seconds=0):
                self.desk.turn()
                going = True
            self.hear()
            if not going and any(client.session.storing for client in self.clients.values()):
                readable(self.desk.fileno())  # workers have something of theirs
                going = True

    def play(self, pieces: Iterable[bytes], *, style: int, contexts: int = 0, read_only: bool = False) -> bytes:
        """Every byte that a session answers to `pieces`, up to its end."""
        self.disk.trim(0, self.disk.size_bytes)
        self.disk.write(0, self.content[: len(self.content) // 2])
        client = self.attach(style=style, contexts=contexts, read_only=read_only)
        for piece in pieces:
            client.send(piece)
            self.settle()
        client.line.sends_no_more = True
        self.settle()
        assert client.line.closed, "the peer hung up, and the session goes on"
        assert client.over
        self.settle()
        used = self.plane.budget.used
        assert used == 0, f"{used} bytes of the budget are lost"
        return bytes(client.line.outgoing)

    def close(self) -> None:
        """Nobody is attached any more."""
        self.settle()
        self.plane.stop()
        self.pool.close()
