from nbdzram.sessions.line import SocketLine
from nbdzram.sessions.tls_context import TlsContext

MOST_BARREN_RECORDS: int
"""Without data, between data, that a peer may send."""

class TlsLine(SocketLine):
    """A connected socket under TLS, which is the line's from now on. Its server's end.

    The event loop haggles by these methods; once a session is begun with it, it is that session's thread's alone.
    """

    def __init__(self, fd: int, context: TlsContext, rest: bytes) -> None:
        """`rest`: ciphertext that came already. Raises MemoryError, and then the socket is still the caller's."""
    @property
    def holds_more(self) -> bool:
        """It holds bytes that came, of which no poller tells."""
    @property
    def waits_to_write(self) -> bool:
        """The last step goes on when the socket can be written to, and not when it can be read."""
    def handshake(self) -> bool:
        """A step of the handshake: whether TLS stands. Raises TlsError, OSError, and EOFError when the peer is gone."""
    def receive(self, target: bytearray | memoryview) -> int | None:
        """Plain bytes into `target`: how many, 0 at the end, None when there are none now. Raises TlsError, OSError."""
    def send(self, source: bytes | memoryview) -> int:
        """Of plain bytes, how many the peer takes now; what it does not take is sent first. Raises OSError."""
    def names(self) -> frozenset[str]:
        """Common name and DNS names of the peer's verified certificate; empty where none is asked for."""
    def say_goodbye(self) -> bool:
        """Everything was given: say close_notify. False: not now."""
    def close(self, *, orderly: bool) -> None:
        """End it. Orderly: what came and was not asked for is dropped, so that the peer gets all that was given."""
