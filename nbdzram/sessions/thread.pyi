from nbdzram.sessions.workers import Workers

class Desk:
    """What serves sessions, but for the waiting. `number`: by which it counts."""

    number: int
    sessions: int
    def __init__(self, number: int, workers: Workers) -> None: ...
    def fileno(self) -> int:
        """Readable when there is mail."""
    def turn(self) -> None:
        """For a desk that nobody waits at: what mail and turns are there to be seen to."""
    def busy_seconds(self) -> float:
        """Spent in turns, since the start."""
    def longest_turn_seconds(self) -> float:
        """The longest turn since this was last asked."""

class IoThread(Desk):
    """A desk with a poller and a thread of its own."""

    def stop(self) -> None:
        """End the thread. All its sessions are buried."""
