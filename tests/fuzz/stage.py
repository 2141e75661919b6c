"""A session without sockets and without a loop: bytes in, bytes out, in any pieces; the engine and workers are real."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

from nbdzram.config import EVERYONE, Limits
from nbdzram.engine.pool import Pool
from nbdzram.nbd.constants import MetaContext, ReplyStyle, TransmissionFlag
from nbdzram.nbd.handshake import Terms
from nbdzram.server.exports import Export, Peer
from nbdzram.server.hosting import Hosting
from nbdzram.server.outlet import Scratch
from nbdzram.server.session import Session
from nbdzram.server.syncs import Syncs
from nbdzram.server.turns import Turns
from nbdzram.server.workers import Budget, Workers


class Line:
    """The transport: takes everything at once and remembers it."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.closed = False
        self.reading = True
        self._null = os.open(os.devnull, os.O_RDONLY)

    def write(self, source: bytes | memoryview) -> None:
        assert not self.closed, "written behind the end"
        self.sent += source

    def get_write_buffer_size(self) -> int:
        return 1  # so that nothing goes past it, straight to the socket

    def get_extra_info(self, name: str) -> Any:
        assert name == "socket"
        return SimpleNamespace(fileno=lambda: self._null)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def hang_up(self) -> None:
        os.close(self._null)


class Loop:
    """What a session wants of an event loop."""

    def __init__(self) -> None:
        self.ready: deque[Callable[[], None]] = deque()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.ready.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> SimpleNamespace:  # noqa: ARG002
        return SimpleNamespace(cancel=lambda: None)

    def create_future(self) -> SimpleNamespace:
        return SimpleNamespace(done=lambda: False, set_result=lambda _: None)


class Stage:
    """One small export, played on again and again; every run starts with the same content."""

    def __init__(self, size: int) -> None:
        self.pool = Pool()
        self.content = bytes(range(1, 252)) * (size // 251 + 1)
        self.content = self.content[: size // 2] + bytes(size - size // 2)
        self.disk = self.pool.create("disk", size)
        self.workers = Workers(1)
        self.scratch = Scratch()

    def play(
        self, pieces: Iterable[bytes], *, style: int, contexts: int = 0, read_only: bool = False, budget: int = 1 << 30
    ) -> bytes:
        """Every byte that a session answers to `pieces`, up to its end."""
        self.disk.trim(0, self.disk.size_bytes)
        self.disk.write(0, self.content[: len(self.content) // 2])
        loop, line = Loop(), Line()
        hosting = SimpleNamespace(
            loop=loop,
            budget=Budget(budget),
            workers=self.workers,
            scratch=self.scratch,
            syncs=Syncs(),
            turns=Turns(),
            limits=Limits(),
            protocol_errors=0,
            end=lambda _: None,
            number_session=lambda: 1,
        )
        export = Export(name="disk", disk=self.disk, pool_name="default", access=EVERYONE, read_only=read_only)
        terms = Terms(export, ReplyStyle(style), tuple(MetaContext)[:contexts], TransmissionFlag(1))
        session = Session(cast(Hosting, hosting), export, terms, Peer("fuzzer"))
        session.start(line, rest=b"")
        for piece in pieces:
            self._feed(session, line, loop, piece)
        if not line.closed:
            session.eof_received()
            self._settle(session, loop)
        assert line.closed, "the peer hung up, and the session goes on"
        session.connection_lost(None)
        line.hang_up()
        assert hosting.budget.used == 0, f"{hosting.budget.used} bytes of the budget are lost"
        return bytes(line.sent)

    def _feed(self, session: Session, line: Line, loop: Loop, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest and line.reading and not line.closed:
            target = memoryview(session.get_buffer(-1))
            size = min(len(rest), len(target))
            assert size, "an empty receive buffer"
            target[:size] = rest[:size]
            target.release()
            session.buffer_updated(size)
            rest = rest[size:]
            self._settle(session, loop)

    def _settle(self, session: Session, loop: Loop) -> None:
        while loop.ready or session.busy:
            while loop.ready:
                loop.ready.popleft()()
            if session.busy:
                select.select([self.workers.fileno()], [], [])
                self.workers.collect()

    def close(self) -> None:
        self.workers.stop()
        self.pool.close()
