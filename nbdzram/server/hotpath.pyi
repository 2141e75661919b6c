from enum import IntEnum
from typing import Any

from nbdzram.engine.disk import Disk
from nbdzram.errors import ProtocolError
from nbdzram.nbd.verdicts import Asked
from nbdzram.server.outlet import Scratch
from nbdzram.server.traffic import Traffic
from nbdzram.server.turns import Turns
from nbdzram.server.workers import Budget, Workers

class Stage(IntEnum):
    """How far the end of a connection has come. Only onwards, and GONE only from LOST."""

    OPEN = 0
    DRAINING = 1
    HALTED = 2
    CLOSING = 3
    LOST = 4
    GONE = 5

UNFRAGMENTED_LIMIT: int
STATUS_INLINE_LIMIT: int
"""Bytes of export that BLOCK_STATUS looks at on the loop. More goes to a thread."""

class HotPath:
    """The transmission phase of one connection. server.session.Session completes it."""

    disk: Disk
    traffic: Traffic
    stage: Stage
    pending: int
    requests: int
    """Taken since the client attached."""
    def __init__(
        self,
        *,
        disk: Disk,
        traffic: Traffic,
        budget: Budget,
        workers: Workers,
        scratch: Scratch,
        turns: Turns,
        style: int,
        read_only: bool,
        context_count: int,
        payload_limit: int,
        connection_limit: int,
        syncs: bool = False,
    ) -> None: ...
    @property
    def payload_remaining(self) -> int:
        """Bytes still to come of the payload that is arriving."""
    @property
    def busy(self) -> bool:
        """Requests are under way with the workers or in Python."""
    @property
    def in_flight(self) -> int:
        """Requests that are under way with the workers or in Python."""
    @property
    def idle_seconds(self) -> float:
        """Since the last request came, or a part of its payload."""
    @property
    def midway(self) -> bool:
        """The peer has begun a request and not finished it."""
    def attach(self, transport: Any, fd: int, rest: bytes) -> None:
        """Begin on `transport`, a TlsChannel or that of the socket `fd`. `rest`: bytes already read."""
    def get_buffer(self, sizehint: int) -> Any:
        """Where the socket's next bytes belong."""
    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes came."""
    def pause_writing(self) -> None:
        """The peer does not read: the transport's queue is not empty."""
    def resume_writing(self) -> None:
        """The transport's queue is empty again."""
    def emit(self, reply: bytes) -> None:
        """Send a reply that Python built."""
    def proceed(self) -> None:
        """Something that held this connection up is gone."""
    def move(self, stage: Stage) -> bool:
        """Go on to `stage`. False: the connection is there already, or further."""
    def drain(self) -> None:
        """Read no more; perform and answer what was asked for completely."""
    def halt(self) -> None:
        """Read no more and perform no more; answer what is under way."""
    def lose(self) -> None:
        """The connection is gone: nothing can be sent any more."""
    def rest(self) -> None:
        """Called now and then: give back what a connection that has become quiet does not need."""
    @property
    def strained(self) -> bool:
        """The budget is used up: answer in small steps."""
    def go_on(self) -> None:
        """The next turn of a connection that had more to do than one wake-up allows."""

    def count_request(self, command: int, verdict: int, length: int, nanoseconds: int) -> None:
        """Account for a request that Python answered."""

    # What the subclass provides.
    def explain_failure(self, verdict: int, asked: Asked, failed_at: int | None) -> bytes:
        """The error reply to a request."""
    def report(self, error: BaseException) -> None:
        """A mistake of ours ended this connection."""
    def query_status(self, asked: Asked, payload: bytes | None, started: int) -> None:
        """Answer BLOCK_STATUS, now or later (count it in `pending`, then call proceed)."""
    def protocol_error(self, error: ProtocolError) -> None:
        """End the connection."""
    def abort(self) -> None:
        """Cut the connection."""
    def gone(self) -> None:
        """The connection was lost, and work that was under way for it has come back."""
    def drained(self) -> None:
        """Nothing is under way, and nothing more will be performed."""
    def call_soon(self, callback: Any) -> None:
        """Run `callback` in the loop's next turn."""
