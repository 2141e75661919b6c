from nbdzram.sessions.line import Line
from nbdzram.sessions.session import Session
from nbdzram.sessions.thread import Desk
from nbdzram.sessions.throttle import Throttle
from nbdzram.sessions.workers import Workers

class RehearsalLine(Line):
    """A line whose peer is a script: tests and the simulator put it in the place of a socket."""

    incoming: bytearray
    """What the peer has sent, and nobody has taken."""
    outgoing: bytearray
    """What it was given."""
    room: int
    """Bytes more that it takes."""
    piece: int
    """The most bytes that are taken at once."""
    sends_no_more: bool
    reset: bool
    """The connection is broken."""
    untold: bool
    """The line takes all that was sent at once, and no poller tells of what it holds: as OpenSSL does with records."""
    mute: bool
    """It has no room for what it says at its end."""
    record: int
    """Plain bytes that a record of the line holds; 1 of a line without."""
    gifts: list[int]
    """Sizes of what it was given."""
    closed: bool
    closed_in_order: bool
    watched: int
    """1: for bytes; 2: for room; 3: for both."""
    def __init__(self) -> None: ...
    @property
    def ready(self) -> bool:
        """A poller would wake the session for it."""

def serve(desk: Desk, session: Session, *, alone: bool = False, way: str = "sleep") -> None:
    """What a poller's word does: bytes came, or the peer reads again; of this session `alone`, or of others too. It was
    waited for in this way."""

def pass_time(desk: Desk, throttle: Throttle, nanoseconds: int) -> None:
    """Let so much time have gone by in an export's schedule, for the sessions that wait at the desk too."""

class Schedule:
    """One limit, by a clock of the test's own. Amounts are requests or bytes, times nanoseconds."""

    def __init__(self, per_second: int, burst: int, *, of_bytes: bool = False) -> None: ...
    def take(self, amount: int, now: int) -> int:
        """When a request may begin that is there now."""
    def take_back(self, amount: int) -> None:
        """It does not begin."""
    def is_scarce(self, now: int) -> bool:
        """Is half of the burst used up?"""

def rest(desk: Desk, session: Session) -> None:
    """What a second does."""

def age(session: Session, seconds: int) -> None:
    """Let so many seconds have gone by since it began to close."""

class Waits:
    """A thread's patience, with waits that the test makes up, on a clock of its own: nanoseconds since the first."""

    now: int

    def way(self) -> str:
        """How would it wait?"""

    def waited(
        self, nanoseconds: int, *, way: str = "sleep", served: int = 1, work: int = 0, vain: bool = False
    ) -> None:
        """A turn of so many requests, that took so long; the next came after so long. `vain`: behind its nap."""

    def passes(self, nanoseconds: int) -> None:
        """Time, with no request."""

    def pause(self) -> None:
        """Something else decides when it goes on."""

    def bar(self, nanoseconds: int) -> None:
        """Somebody else ran on its processor for so long."""

class Looks:
    """I/O threads that look before they sleep, or are at work, on some processors."""

    def __init__(self, workers: Workers) -> None: ...
    def begins(self) -> bool:
        """May one more look?"""

    def ends(self) -> None:
        """One of them looks no more."""

    def works(self, threads: int) -> None:
        """So many more are in a turn, or fewer."""

class Stores:
    """What a session learns of its large WRITEs, each so long as the test says, on a clock of its own: nanoseconds."""

    now: int

    def store(self, length: int, *, here: int, beside: int, pause: int = 0, idle: bool = True) -> bool:
        """One more comes, `pause` after the last: whether the workers store it."""

def delay(session: Session, nanoseconds: int) -> None:
    """Let the large WRITE that is under way take so much longer."""

def let_pause(session: Session, nanoseconds: int) -> None:
    """Let so much time have gone by since its last large WRITE."""
