"""Listening over TCP on each address that a host name stands for, and this machine has.

IPv6 is often compiled in and not configured, or not there at all, while /etc/hosts calls ::1 localhost: of a name's
addresses those that are lacking are passed over, as long as one is left.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from nbdzram.config import TcpAddress

NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT})
LACKING = frozenset({errno.EADDRNOTAVAIL}) | NO_FAMILY
"""What the system says of an address that it does not have, or of a whole family."""

Lack = tuple[str, OSError]


class Found(NamedTuple):
    """An address, and what socket it wants."""

    family: int
    kind: int
    protocol: int
    target: Any  # what to bind to: the host, the port, and of IPv6 more


def look_up(address: TcpAddress) -> list[Found]:
    """What the name stands for. Raises OSError, UnicodeError."""
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(Found(family, kind, protocol, target) for family, kind, protocol, _, target in found))


def listen_on(
    found: Iterable[Found], backlog: int, prepare: Callable[[socket.socket], None] = lambda _: None
) -> tuple[list[socket.socket], list[Lack]]:
    """A socket for each that this machine has, and the addresses that it lacks, with what the system says of them.

    `prepare` is called with each before it is bound. Raises OSError, OverflowError: of an address that is there and
    cannot be had, as clients would reach whoever uses it, or where none is there; nothing is open then.
    """
    opened: list[socket.socket] = []
    lacking: list[Lack] = []
    try:
        for one in found:
            try:
                opened.append(_listen(one, backlog, prepare))
            except OSError as error:
                if error.errno not in LACKING:
                    raise
                lacking.append((str(one.target[0]), error))
        if not opened:
            raise lacking[0][1]
    except BaseException:
        close_all(opened)
        raise
    return opened, lacking


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close what was opened so far."""
    for listener in sockets:
        listener.close()


def _listen(one: Found, backlog: int, prepare: Callable[[socket.socket], None]) -> socket.socket:
    listener = socket.socket(one.family, one.kind, one.protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if one.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 0.0.0.0 is another socket's
        prepare(listener)
        listener.bind(one.target)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
