"""Listeners and attached clients on their way from one process to another that serves the same state directory.

A takeover is a stop and a start between which connections live. Clients see a pause, and no end.

    new     is up, has read its configuration, and asks on the control socket; listens on a socket of its own
    old     looks whether it can; accepts nobody more, and lets clients come to rest: whatever was asked for completely
            is answered, and what came of the next request is kept. Then it stops as ever, and its pools are closed
    old ──> new   this: a line of text, then the descriptors
    new     starts as ever, and serves them
    new ──> old   SERVING; the old one leaves

Without that word (the new one ends, is silent for too long, or hangs up) the old one does what the new one would have:
it starts as ever, with what it had given away, which is its own still: the descriptors that travel are copies.

The text is one JSON object, written by FORMAT; whoever asks says which it speaks, and is refused if that is another.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nbdzram.errors import UserError
from nbdzram.nbd.constants import MetaContext, ReplyStyle, TransmissionFlag
from nbdzram.receive import receive_exactly
from nbdzram.server.exports import Peer

FORMAT = 1
SERVING = b"serving\n"
DESCRIPTORS_AT_ONCE = 200  # of SCM_MAX_FD, 253; unix(7)
LONGEST_TEXT = 64 << 20  # a client's own is a few hundred bytes, and what came of its next request, 256 KiB at most
ANSWER_SECONDS = 60.0  # to open pools of 500 GiB; a process that died is noticed at once
_LENGTH = struct.Struct(">I")


@dataclass(slots=True)
class Client:
    """An attached client at rest, and its socket."""

    export: str
    size_bytes: int  # that it was told
    style: ReplyStyle
    contexts: tuple[MetaContext, ...]
    flags: TransmissionFlag
    peer: Peer
    since: float
    rest: bytes  # what came behind the last request that was answered
    connection: socket.socket

    def text(self) -> dict[str, Any]:
        """All but the socket."""
        return {
            "export": self.export,
            "size_bytes": self.size_bytes,
            "style": int(self.style),
            "contexts": [int(context) for context in self.contexts],
            "flags": int(self.flags),
            "peer": self.peer.text,
            "address": None if self.peer.address is None else str(self.peer.address),
            "local": self.peer.local,
            "since": self.since,
            "rest": base64.b64encode(self.rest).decode(),
        }

    @classmethod
    def of(cls, text: dict[str, Any], connection: socket.socket) -> Self:
        """What `text` told. Raises KeyError, TypeError, ValueError for what it cannot have told."""
        address = None if text["address"] is None else ipaddress.ip_address(text["address"])
        return cls(
            export=str(text["export"]),
            size_bytes=int(text["size_bytes"]),
            style=ReplyStyle(text["style"]),
            contexts=tuple(map(MetaContext, text["contexts"])),
            flags=TransmissionFlag(text["flags"]),
            peer=Peer(str(text["peer"]), address, local=bool(text["local"])),
            since=float(text["since"]),
            rest=base64.b64decode(text["rest"], validate=True),
            connection=connection,
        )


@dataclass(slots=True)
class Handover:
    """What is served, without the pools."""

    listeners: list[socket.socket] = field(default_factory=list)
    paths: list[tuple[Path, int]] = field(default_factory=list)  # files of unix sockets that we made, and their inodes
    clients: list[Client] = field(default_factory=list)
    accepted: int = 0

    def close(self) -> None:
        """Let all descriptors go: of clients, whose connections end unless another process has them."""
        for one in (*self.listeners, *(client.connection for client in self.clients)):
            one.close()

    def give(self, to: socket.socket) -> None:
        """Send all of it; ours stays ours. Raises OSError."""
        text = {
            "format": FORMAT,
            "listeners": len(self.listeners),
            "paths": [[str(path), inode] for path, inode in self.paths],
            "clients": [client.text() for client in self.clients],
            "accepted": self.accepted,
        }
        encoded = json.dumps(text).encode()
        to.sendall(_LENGTH.pack(len(encoded)) + encoded)
        descriptors = [one.fileno() for one in (*self.listeners, *(client.connection for client in self.clients))]
        for start in range(0, len(descriptors), DESCRIPTORS_AT_ONCE):
            socket.send_fds(to, [b"."], descriptors[start : start + DESCRIPTORS_AT_ONCE])

    @classmethod
    def take(cls, giver: socket.socket) -> Self:
        """What the other process gives. Raises UserError, and then nothing of it is ours."""
        taken: list[socket.socket] = []
        try:
            (length,) = _LENGTH.unpack(receive_exactly(giver.recv, _LENGTH.size, "it"))
            if length > LONGEST_TEXT:
                raise UserError(f"the other server gives {length} bytes of text; {LONGEST_TEXT} are the most")
            text = json.loads(receive_exactly(giver.recv, length, "it"))
            if text["format"] != FORMAT:
                raise UserError(f"the other server gives in format {text['format']}, this program takes {FORMAT}")
            wanted = int(text["listeners"]) + len(text["clients"])
            while len(taken) < wanted:
                mark, descriptors, _, _ = socket.recv_fds(giver, 1, DESCRIPTORS_AT_ONCE)
                taken += [socket.socket(fileno=descriptor) for descriptor in descriptors]
                if not mark or not descriptors:
                    raise UserError("the other server hung up while it gave away its connections")
            listeners, connections = taken[: int(text["listeners"])], taken[int(text["listeners"]) :]
            return cls(
                listeners=listeners,
                paths=[(Path(path), int(inode)) for path, inode in text["paths"]],
                clients=[Client.of(one, of) for one, of in zip(text["clients"], connections, strict=True)],
                accepted=int(text["accepted"]),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            close(taken)
            raise UserError(f"the other server did not give away its connections: {error}") from None
        except UserError:
            close(taken)
            raise


def give_away(handover: Handover, path: Path) -> int | None:
    """Give all to whoever listens at `path`, and wait for its word. Its process's number; None: go on yourself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to, contextlib.suppress(OSError):
        to.settimeout(ANSWER_SECONDS)
        to.connect(str(path))
        handover.give(to)
        if receive_exactly(to.recv, len(SERVING), "it") == SERVING:
            pid, _, _ = struct.unpack("3i", to.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return int(pid)
    return None


def close(sockets: Sequence[socket.socket]) -> None:
    """Close what was taken so far."""
    for one in sockets:
        one.close()
