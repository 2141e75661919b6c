"""Reading so many bytes, however they come."""

from __future__ import annotations

from collections.abc import Callable

AT_ONCE_BYTES = 1 << 20


def receive_exactly(receive: Callable[[int], bytes], count: int, who: str) -> bytes:
    """`count` bytes of a socket that blocks, by its recv. Raises OSError; ConnectionError when `who`, as it is then
    called, hangs up before.
    """
    received = bytearray()
    while len(received) < count:
        piece = receive(min(count - len(received), AT_ONCE_BYTES))
        if not piece:
            raise ConnectionError(f"{who} hung up")
        received += piece
    return bytes(received)
