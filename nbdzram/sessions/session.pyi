from nbdzram.engine.disk import Disk
from nbdzram.sessions.line import Line
from nbdzram.sessions.stage import Ending, Stage

class Session:
    """One attached client, served by a thread. Made by Plane.attach; what is read here was true a moment ago."""

    disk: Disk
    line: Line
    number: int
    stage: Stage
    requests: int
    """Taken since it attached."""
    ending: Ending
    ending_value: int
    """LINE_BROKE: errno, or 0. LONG_PAYLOAD, TOO_SLOW: bytes. HALF_A_REPLY: the offset."""
    left: bool
    """The peer closed."""
    released: bool
    """It ended at rest, and its line is open."""
    def take_rest(self) -> bytes:
        """Of a released one, once: what came behind the last request that was answered."""
    @property
    def in_flight(self) -> int:
        """Requests that are under way."""
    @property
    def storing(self) -> int:
        """Large WRITEs that the workers store."""
    @property
    def idle_seconds(self) -> float:
        """Since the last request came, or a part of its payload."""
    @property
    def midway(self) -> bool:
        """The peer has begun a request and not finished it; had, when it is lost."""
    @property
    def waits_for_peer(self) -> bool:
        """The rest of a payload is to come, or answers are not read."""
    @property
    def waits_for_room(self) -> bool:
        """Memory is short, and nothing is read of a payload before those of others are stored."""
    @property
    def payload_remaining(self) -> int:
        """Bytes still to come of the payload that is arriving."""
    @property
    def error_count(self) -> int:
        """Requests that were refused or failed."""
