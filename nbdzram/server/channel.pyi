import ssl
from collections.abc import Callable
from typing import Any, Protocol

class Receiver:
    """Where ciphertext arrives. One a server: it is empty between two wake-ups."""

class Above(Protocol):
    """The protocol above a channel: asyncio.BufferedProtocol's methods, and how TLS began."""

    def tls_established(self) -> None:
        """The peer has proved what it had to; plain bytes follow."""
    def tls_failed(self, error: Exception) -> None:
        """TLS could not begin. The alert for the peer is sent; abort now."""
    def expel(self, reason: str) -> None:
        """The peer costs more than it may: cut the connection."""

class TlsChannel:
    """TLS between a socket's transport and a protocol; a transport to the one, a protocol to the other."""

    closing: bool
    def __init__(
        self,
        *,
        below: Any,
        above: Above,
        fd: int,
        context: ssl.SSLContext,
        receiver: Receiver,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None: ...
    def take_turns(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """From now on this channel's turns come by `call_soon`."""
    def start(self, rest: bytes) -> None:
        """Take the transport over and begin TLS; `rest`: bytes that came behind STARTTLS."""
    @property
    def ssl_object(self) -> ssl.SSLObject:
        """What was negotiated, and with whom."""

    # What the socket's transport calls.
    def connection_made(self, transport: Any) -> None: ...
    def get_buffer(self, sizehint: int) -> Any: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def eof_received(self) -> bool: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...

    # What the protocol above calls, with asyncio.Transport's meaning.
    def write(self, plain: bytes | memoryview) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def set_protocol(self, protocol: object) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_extra_info(self, name: str) -> Any: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
