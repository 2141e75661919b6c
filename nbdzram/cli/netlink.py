"""The kernel's NBD client over generic netlink: attach sockets, put new ones in place of dead ones, detach.

Only here it is told how long requests wait for a new connection (DEAD_CONN_TIMEOUT), which nbd-client leaves at 0: not
at all. And only of a device that was attached this way the kernel tells when a connection died (LINK_DEAD).

    message    length u32 | type u16 | flags u16 | sequence u32 | port u32 | command u8, version u8, 0 u16 | attributes
    attribute  length u16 | type u16 | value, padded to 4 bytes              a value may be attributes again

All in the machine's byte order. Sources: include/uapi/linux/{netlink,genetlink,nbd-netlink}.h; what the kernel does
with it: drivers/block/nbd.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from nbdzram.errors import UserError, reason_of
from nbdzram.ready import readable

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # above it: nested, and of network byte order
_ERROR = 2  # the type of an answer that is an errno, 0 for done
_REQUEST, _ACKNOWLEDGE = 1, 4
_CONTROLLER, _GET_FAMILY = 16, 3  # the family that knows the others, and its question
_FAMILY_ID, _FAMILY_NAME, _GROUPS, _GROUP_NAME, _GROUP_ID = 1, 2, 7, 1, 2
_NETLINK_GENERIC, _SOL_NETLINK, _ADD_MEMBERSHIP = 16, 270, 1
_LONGEST_ANSWER = 1 << 16
_ANSWER_SECONDS = 30.0
"""The kernel answers at once, but for a RECONFIGURE that waits for a request which is being sent."""


class Command(IntEnum):
    """What the family "nbd" is told, and, last, tells."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4


class Attribute(IntEnum):
    """Of those commands."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    BACKEND_IDENTIFIER = 10


_SOCKET_ITEM = _SOCKET_FD = 1


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the kernel waits, in seconds."""

    request: int  # for an answer; then the connection is given up, and the request sent over another
    dead: int  # for a connection; then requests are I/O errors


class Device(Protocol):
    """An NBD device of the kernel; a test has one of its own."""

    def attached(self) -> bool:
        """Whether it has connections, living or dead."""

    def connect(self, sockets: Sequence[socket.socket], size_bytes: int, flags: int, patience: Patience) -> None:
        """Attach it. Raises OSError."""

    def replace(self, sockets: Sequence[socket.socket], patience: Patience) -> None:
        """Put sockets in place of its dead connections; one that is not needed is left alone. Raises OSError."""

    def disconnect(self) -> None:
        """Detach it. Raises OSError."""

    def is_named(self) -> bool:
        """Whether the kernel knows of which server and export what is attached is. Then it takes connections of no
        other."""

    def size_bytes(self) -> int:
        """Of what is attached."""

    def read_only(self) -> bool:
        """Whether what is attached may be read alone."""

    def in_use(self) -> bool:
        """Whether it is mounted, swapped to, or otherwise somebody's own."""

    def wait(self, seconds: float, *, wake: int) -> bool:
        """Until a connection of it died (True), `wake` can be read, or the time is over."""


class NetlinkDevice:
    """`/dev/nbdN` as the kernel knows it. Raises UserError where it has no such client."""

    def __init__(self, path: str, backend: str, block_size: int) -> None:
        self.name = path.removeprefix("/dev/")
        self._index = int(self.name.removeprefix("nbd"))
        self._backend = backend.encode() + b"\0"
        self._block_size = block_size
        self._kernel = _generic()
        self._family, group = self._resolve()
        self._deaths = _generic()
        self._deaths.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._deaths.setblocking(False)

    def attached(self) -> bool:
        """See Device."""
        return Path(f"/sys/block/{self.name}/pid").exists()

    def connect(self, sockets: Sequence[socket.socket], size_bytes: int, flags: int, patience: Patience) -> None:
        """See Device."""
        self._ask(
            Command.CONNECT,
            _u64(Attribute.SIZE_BYTES, size_bytes),
            _u64(Attribute.BLOCK_SIZE_BYTES, self._block_size),
            _u64(Attribute.SERVER_FLAGS, flags),
            *_waits(patience),
            _sockets(sockets),
            attribute(Attribute.BACKEND_IDENTIFIER, self._backend),
        )

    def replace(self, sockets: Sequence[socket.socket], patience: Patience) -> None:
        """See Device. The kernel holds against the backend only what was attached with one."""
        backend = attribute(Attribute.BACKEND_IDENTIFIER, self._backend)
        self._ask(Command.RECONFIGURE, *_waits(patience), _sockets(sockets), backend)

    def disconnect(self) -> None:
        """See Device."""
        self._ask(Command.DISCONNECT)

    def is_named(self) -> bool:
        """See Device."""
        return Path(f"/sys/block/{self.name}/backend").exists()

    def size_bytes(self) -> int:
        """See Device. The kernel counts in 512 bytes, whatever the block size."""
        return int(Path(f"/sys/block/{self.name}/size").read_text()) * 512

    def read_only(self) -> bool:
        """See Device."""
        return Path(f"/sys/block/{self.name}/ro").read_text().strip() == "1"

    def in_use(self) -> bool:
        """See Device. Who opens a block device exclusively is refused while a file system or the swap has it."""
        try:
            os.close(os.open(f"/dev/{self.name}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    def wait(self, seconds: float, *, wake: int) -> bool:
        """See Device. A burst too long for the socket's buffer (ENOBUFS) may have held one of ours."""
        deaths = self._deaths.fileno()
        return deaths in readable(deaths, wake, seconds=seconds) and any(list(self._died()))

    def _died(self) -> Iterator[bool]:
        while True:
            try:
                told = self._deaths.recv(_LONGEST_ANSWER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield True
                continue
            command, attributes = _generic_part(told)
            index = attributes.get(Attribute.INDEX, b"")
            yield command == Command.LINK_DEAD and index == struct.pack("=I", self._index)

    def _ask(self, command: Command, *attributes: bytes) -> None:
        index = attribute(Attribute.INDEX, struct.pack("=I", self._index))
        exchange(self._kernel, self._family, command, index, *attributes)

    def _resolve(self) -> tuple[int, int]:
        """The number of the family, and of its group. Raises UserError."""
        try:
            answer = exchange(self._kernel, _CONTROLLER, _GET_FAMILY, attribute(_FAMILY_NAME, b"nbd\0"))
        except OSError as error:
            self._kernel.close()
            raise UserError(
                f"the kernel's NBD client cannot be reached over netlink ({reason_of(error)}); modprobe nbd"
            ) from None
        _, told = _generic_part(answer)
        groups = [dict(attributes(group)) for _, group in attributes(told[_GROUPS])]
        (family,) = struct.unpack("=H", told[_FAMILY_ID])
        (group,) = struct.unpack("=I", groups[0][_GROUP_ID])
        return family, group


def message(kind: int, command: int, *attributes: bytes) -> bytes:
    """One request, whose end the kernel acknowledges."""
    body = _GENERIC.pack(command, 1, 0) + b"".join(attributes)
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACKNOWLEDGE, 0, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """With its padding, which its length does not count."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Each with its value."""
    while len(text) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(text)
        yield kind & _TYPE_MASK, text[_ATTRIBUTE.size : length]
        text = text[max((length + 3) & ~3, _ATTRIBUTE.size) :]


def exchange(kernel: socket.socket, kind: int, command: int, *attributes: bytes) -> bytes:
    """Ask, and wait for the acknowledgement; returns what was answered before it. Raises OSError with its errno."""
    kernel.send(message(kind, command, *attributes))
    answer = b""
    while True:
        told = kernel.recv(_LONGEST_ANSWER)
        while len(told) >= _HEADER.size:
            length, told_kind, _, _, _ = _HEADER.unpack_from(told)
            if told_kind == _ERROR:
                (code,) = struct.unpack_from("=i", told, _HEADER.size)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return answer
            answer, told = told[:length], told[max((length + 3) & ~3, _HEADER.size) :]


def _generic_part(told: bytes) -> tuple[int, dict[int, bytes]]:
    command, _, _ = _GENERIC.unpack_from(told, _HEADER.size)
    return command, dict(attributes(told[_HEADER.size + _GENERIC.size :]))


def _generic() -> socket.socket:
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
    except OSError as error:
        raise UserError(
            f"the kernel's NBD client is told over netlink, which cannot be had here: {error.strerror}"
        ) from None
    made.bind((0, 0))
    made.settimeout(_ANSWER_SECONDS)
    return made


def _u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def _waits(patience: Patience) -> tuple[bytes, bytes]:
    return _u64(Attribute.TIMEOUT, patience.request), _u64(Attribute.DEAD_CONN_TIMEOUT, patience.dead)


def _sockets(sockets: Sequence[socket.socket]) -> bytes:
    numbers = (attribute(_SOCKET_FD, struct.pack("=I", one.fileno())) for one in sockets)
    return attribute(Attribute.SOCKETS, b"".join(attribute(_SOCKET_ITEM, number) for number in numbers))
