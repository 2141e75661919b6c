"""What the system keeps of replies that a TCP peer does not read: little, and not for long."""

from __future__ import annotations

import contextlib
import socket

UNSENT_BYTES = 64 << 10
"""What the system takes of replies for a peer beyond what is on its way to it. By itself it takes 2 to 4 MiB, counted
by nobody and kept for minutes behind our end: 400 clients that read nothing made it hold 1.5 GiB, and now 35 MiB."""

UNHEARD_SECONDS = 10.0
"""How long the system waits for an NBD client that takes nothing, while it haggles and once it is closed: sessions/line
says for how long it does meanwhile."""


def keep_little(endpoint: socket.socket, seconds: float) -> None:
    """Of a TCP socket, or of all that one accepts: let the system take little ahead, and give up a peer that takes
    nothing for so long.
    """
    ask(endpoint, (socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES), (socket.TCP_USER_TIMEOUT, int(seconds * 1000)))


def ask(endpoint: socket.socket, *options: tuple[int, int]) -> None:
    """Set options of TCP, as many as the system knows: an emulated kernel, or MPTCP of an older one, knows some."""
    for option, value in options:
        with contextlib.suppress(OSError):
            endpoint.setsockopt(socket.IPPROTO_TCP, option, value)
