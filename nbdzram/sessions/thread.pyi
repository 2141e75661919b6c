from nbdzram.sessions.session import Session
from nbdzram.sessions.workers import Workers

class Desk:
    """What serves sessions, but for the waiting. `number`: by which it counts."""

    number: int
    sessions: int
    def __init__(self, number: int, workers: Workers) -> None: ...
    def fileno(self) -> int:
        """Readable when there is mail."""
    def turn(self) -> None:
        """For the desk of the event loop: what mail and turns are there to be seen to."""
    def buffer(self, session: Session) -> memoryview:
        """Where the next bytes of a client belong whose line the event loop serves."""
    def received(self, session: Session, size: int) -> None:
        """`size` bytes came there."""
    def resumed(self, session: Session) -> None:
        """The client reads again."""
    def left(self, session: Session) -> None:
        """The client sends no more."""
    def lost(self, session: Session, error: int) -> None:
        """The line is gone; an errno says why, or 0."""
    def busy_seconds(self) -> float:
        """Spent in turns, since the start."""
    def longest_turn_seconds(self) -> float:
        """The longest turn since this was last asked."""

class IoThread(Desk):
    """A desk with a poller and a thread of its own."""

    def stop(self) -> None:
        """End the thread. All its sessions are buried."""
