"""A client's side of the handshake: greeting, GO, and the socket is ready for the kernel.

Nothing is negotiated beside that, since the kernel speaks plain requests and simple replies. Sections of the protocol:
"Newstyle negotiation", "Option types" (GO).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbdzram.cli.hints import NO_TLS, Address
from nbdzram.errors import UserError, reason_of
from nbdzram.nbd.constants import (
    INIT_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from nbdzram.receive import receive_exactly

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_EXPORT = struct.Struct(">HQH")  # which information, size, transmission flags
_LONGEST_REPLY = 1 << 16
_REFUSED = 1 << 31  # set in every reply that is an error
DIAL_SECONDS = 5.0
"""For the connection, and for each answer; a server that is slower is tried again, and requests wait meanwhile."""


Place = tuple[int, Any]  # a family, and where of it a server listens


class Refused(UserError):
    """The server is there, and does not let this client have the export."""


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection that is in transmission."""

    socket: socket.socket
    size_bytes: int
    flags: TransmissionFlag


def dialler(address: Address, export: str) -> Callable[[], Dialled]:
    """What connects, as often as it is called. The name is looked up once, now; of several addresses the first that is
    reached is the server from then on, as a name may stand for several servers.

    It is called while requests wait, of the disk too on which /etc/hosts may lie. Raises UserError.
    """
    places: list[Place] = [(socket.AF_UNIX, address.path)] if address.path is not None else _look_up(address)

    def dial() -> Dialled:
        made, place = _connect(places)
        try:
            if address.path is None:
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            size_bytes, flags = greet(made, export)
            made.setblocking(True)
        except BaseException:
            made.close()
            raise
        places[:] = [place]
        return Dialled(made, size_bytes, flags)

    return dial


def _look_up(address: Address) -> list[Place]:
    """Raises UserError."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name can be so long, or have such letters
        raise UserError(f"'{address.host}' cannot be looked up: {reason_of(error)}") from None
    return [(family, where) for family, _, _, _, where in found]


def _connect(places: Sequence[Place]) -> tuple[socket.socket, Place]:
    """The first of them that can be reached. Raises OSError, that of the last."""
    refusal: OSError | None = None
    for family, where in places:
        try:
            made = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            refusal = error
            continue
        try:
            made.settimeout(DIAL_SECONDS)
            made.connect(where)
        except OSError as error:
            made.close()
            refusal = error
        else:
            return made, (family, where)
    assert refusal is not None
    raise refusal


def greet(server: socket.socket, export: str) -> tuple[int, TransmissionFlag]:
    """Size and flags of the export, in whose transmission phase the socket is then. Raises OSError, Refused."""
    magic, option_magic, offered = _GREETING.unpack(receive_exactly(server.recv, _GREETING.size, "the server"))
    if (magic, option_magic) != (INIT_MAGIC, OPTION_MAGIC) or not offered & HandshakeFlag.FIXED_NEWSTYLE:
        raise Refused("what answers there is no NBD server of today (fixed newstyle)")
    name = export.encode()
    asked = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    flags = ClientFlag.FIXED_NEWSTYLE | (offered & HandshakeFlag.NO_ZEROES)
    server.sendall(struct.pack(">I", flags) + _OPTION.pack(OPTION_MAGIC, Option.GO, len(asked)) + asked)
    found: tuple[int, TransmissionFlag] | None = None
    while True:
        magic, option, reply, size = _REPLY.unpack(receive_exactly(server.recv, _REPLY.size, "the server"))
        if (magic, option) != (OPTION_REPLY_MAGIC, Option.GO) or size > _LONGEST_REPLY:
            raise Refused("the server answers what was not asked")
        body = receive_exactly(server.recv, size, "the server")
        if reply == Reply.ERR_TLS_REQD:
            raise Refused(f"the server asks for TLS, {NO_TLS}")
        if reply & _REFUSED:
            raise Refused(f"the server refuses the export '{export}': {body.decode(errors='replace') or hex(reply)}")
        if reply == Reply.ACK and found is not None:
            return found
        if reply == Reply.INFO and size == _EXPORT.size and body[:2] == struct.pack(">H", Info.EXPORT):
            _, size_bytes, told = _EXPORT.unpack(body)
            found = size_bytes, TransmissionFlag(told)
