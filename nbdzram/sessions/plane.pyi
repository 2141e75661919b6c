from collections.abc import Sequence

from nbdzram.engine.disk import Disk
from nbdzram.sessions.budget import Budget
from nbdzram.sessions.line import Line
from nbdzram.sessions.notices import Notices
from nbdzram.sessions.session import Session
from nbdzram.sessions.tally import Tally
from nbdzram.sessions.thread import Desk, IoThread
from nbdzram.sessions.throttle import Throttle
from nbdzram.sessions.turns import Turns
from nbdzram.sessions.workers import Workers

MOST_IO_THREADS: int

Notice = tuple[int, int, int, int, int, int, int]
"""Session's number, verdict, command, flags, offset, length, size of the export."""

class Plane:
    """Python's face of the data plane. The event loop's thread only."""

    budget: Budget
    workers: Workers
    turns: Turns
    notices: Notices
    threads: list[IoThread]
    def __init__(self, threads: int, processors: int, budget_bytes: int) -> None: ...
    def fileno(self) -> int:
        """Readable when `collect` has something to tell."""
    def attach(
        self,
        line: Line,
        *,
        number: int,
        disk: Disk,
        tally: Tally,
        throttle: Throttle,
        style: int,
        read_only: bool,
        contexts: Sequence[int],
        payload_limit: int,
        connection_limit: int,
        syncs: bool,
        greeting: bytes,
        rest: bytes,
        line_bytes: int = 0,
        desk: Desk | None = None,
    ) -> Session:
        """Make a session of a client, for the thread with the fewest, or for a `desk` that the caller serves.

        `line_bytes`: what the line's own buffers take. The session is served from `begin` on.
        """
    def begin(self, session: Session) -> None:
        """Let its thread begin with it."""
    def go_on(self, session: Session) -> None:
        """Its export's limits are others than they were: it need not wait as long, or longer."""
    def drain(self, session: Session) -> None:
        """Read no more of it; answer what it asked for completely, then close."""
    def release(self, session: Session) -> None:
        """As drain, but behind a payload that is arriving; and the line stays open, for another process."""
    def abort(self, session: Session) -> None:
        """Cut it."""
    def syncs_asked(self, session: Session) -> int:
        """The number of the last answer that waits for a sync."""
    def synced(self, session: Session, number: int, failed: bool) -> None:
        """A sync has ended that began when answers up to `number` waited for it."""
    def rest(self) -> None:
        """Once a second: threads give back what quiet sessions do not need, and nobody holds others up."""
    def collect(self) -> tuple[list[tuple[Session, bool, bool, bool]], list[Notice]]:
        """What sessions told, and notices for the log.

        Of each session that told something: whether it ended, waits for a sync, is gone.
        """
    def bury(self, session: Session) -> None:
        """It was told GONE, and that was seen to: nothing is wished of it any more."""
    def stop(self) -> None:
        """End the threads. Every session is buried, or will be as they end."""
