"""Hostile clients by the dozen, and what the server they attack needs meanwhile."""

from __future__ import annotations

import contextlib
import random
import resource
import selectors
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self, cast

from tests.support.nbd_client import Client, open_socket
from tests.support.server import Nbdzram
from tests.support.unread import unread_bytes
from tests.wire import CMD_READ, CMD_WRITE, request

KIB, MIB = 1 << 10, 1 << 20
LONG = 32 * MIB
STORED = random.Random(5).randbytes(MIB)
"""What each of the first 32 MiB of a target holds: it does not compress, so replies cost what they seem to."""

OTHERS = random.Random(6).randbytes(300_000)
GROWTH_LIMIT = 64 * MIB  # what any of these crowds may cost, with the server's default limits
SETTLE_SECONDS = 30


class Watch:
    """The server's resident peak and descriptors since the watch began (Linux: proc(5), clear_refs 5 resets VmHWM)."""

    def __init__(self, server: Nbdzram) -> None:
        self.server = server
        self.process = Path(f"/proc/{server.pid}")
        (self.process / "clear_refs").write_text("5")
        self._resident = self._status("VmRSS")
        self._descriptors = self.descriptors

    def _status(self, field: str) -> int:
        for line in (self.process / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * KIB
        raise AssertionError(f"no {field} in {self.process}/status")

    @property
    def peak_growth(self) -> int:
        """Bytes of resident memory above the start, at the worst moment since."""
        return self._status("VmHWM") - self._resident

    @property
    def growth(self) -> int:
        return self._status("VmRSS") - self._resident

    @property
    def descriptors(self) -> int:
        return len(list((self.process / "fd").iterdir()))

    @property
    def unread(self) -> int:
        """Bytes that the system keeps for the server's TCP peers, who have not taken them."""
        assert self.server.port is not None
        return unread_bytes(self.server.port)

    def expect_modest(self) -> None:
        assert self.unread < GROWTH_LIMIT, f"the system keeps {self.unread / MIB:.1f} MiB"
        assert self.peak_growth < GROWTH_LIMIT, f"grew by {self.peak_growth / MIB:.1f} MiB"

    def expect_left(self) -> None:
        """Everybody hung up, and the server has noticed."""
        self.server.wait_until(lambda: self.descriptors <= self._descriptors, SETTLE_SECONDS)

    def expect_recovered(self) -> None:
        """Everybody hung up: descriptors are back, and so is nearly all memory."""
        self.expect_left()
        self.server.wait_until(lambda: self.growth < 8 * MIB, SETTLE_SECONDS)


class Crowd:
    """Sockets whose owners behave badly together; leaving the context closes them all."""

    def __init__(self) -> None:
        self.members: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disperse()

    def disperse(self, *, reset: bool = False) -> None:
        """Everybody leaves; with `reset` by RST, so that the server's next send fails."""
        for member in self.members:
            if reset:
                member.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            member.close()
        self.members.clear()

    def attach(self, server: Nbdzram, count: int, *, tcp: bool = False, tls: ssl.SSLContext | None = None) -> None:
        """Clients that reach the transmission phase, with simple replies."""
        assert server.port is not None
        for _ in range(count):
            client = Client(("127.0.0.1", server.port) if tcp else server.unix_path, "disk", tls=tls)
            self.members.append(client.socket)

    def connect(self, server: Nbdzram, count: int) -> None:
        """Clients that say nothing."""
        self.members += [open_socket(server.unix_path) for _ in range(count)]

    def press(self, parts: list[list[bytes]]) -> None:
        """Each member sends its own `parts` as far as the server takes them, until nobody's socket takes any more."""
        with selectors.DefaultSelector() as waiting:
            for member, part in zip(self.members, parts, strict=True):
                member.setblocking(False)
                if part:
                    waiting.register(member, selectors.EVENT_WRITE, list(part))
            while waiting.get_map() and (ready := waiting.select(1.0)):
                for key, _ in ready:
                    member = cast("socket.socket", key.fileobj)
                    _send_some(member, key.data)
                    if not key.data:
                        waiting.unregister(member)


def _send_some(member: socket.socket, parts: list[bytes]) -> None:
    with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
        while parts:
            sent = member.send(parts[0])
            parts[0] = parts[0][sent:]
            if not parts[0]:
                parts.pop(0)


def reads(count: int, length: int) -> list[bytes]:
    return [request(CMD_READ, 0, length, cookie=cookie) for cookie in range(count)]


def half_a_write(offset: int, length: int, content: bytes) -> list[bytes]:
    """A WRITE whose payload stops half-way."""
    return [request(CMD_WRITE, offset, length), *[content] * (length // len(content) // 2)]


def store(client: Client) -> None:
    """Give a target the content that its crowd asks for."""
    for offset in range(0, LONG, MIB):
        client.write(offset, STORED)


def expect_others_are_served(server: Nbdzram, *, tls: ssl.SSLContext | None = None) -> None:
    """Someone else comes, reads, and writes small and large; all of it works."""
    with Client(server.unix_path, "disk", tls=tls) as other:
        assert other.read(0, MIB) == STORED
        for offset, content in ((900 * MIB, OTHERS), (901 * MIB + 5, OTHERS[:4096]), (902 * MIB, STORED * 4)):
            other.write(offset, content)
            assert other.read(offset, len(content)) == content
        other.trim(900 * MIB, 8 * MIB)


def drain(member: socket.socket) -> int:
    """Read until the server hangs up, and count the bytes; a server that does not is a TimeoutError."""
    member.settimeout(30)
    count = 0
    try:
        while received := len(member.recv(65536)):
            count += received
    except ConnectionResetError:
        pass
    return count


def drip(slow: socket.socket, byte: bytes) -> bool:
    """Send one byte and give the server a moment. False: it has hung up."""
    try:
        slow.send(byte)
        return slow.recv(64) != b""
    except TimeoutError:
        return True
    except (BrokenPipeError, ConnectionResetError):
        return False


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """A thousand connections need more descriptors than some shells allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
