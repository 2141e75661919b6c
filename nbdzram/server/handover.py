"""All that is served, on its way from one process to another: listeners, attached clients, what was counted, and
without a state directory the arenas themselves.

A takeover is a stop and a start between which connections live. Clients see a pause, and no end.

    new     is up, has read its configuration, and asks on the control socket; listens on a socket of its own
    old     looks whether it can, and connects there: from here on each hears of the other's end. It ends changes,
            runs, streams and checkpoints, while clients are served as ever; then accepts nobody more, and lets clients
            come to rest: whatever was asked for completely is answered, and what came of the next request is kept.
            Then its pools are closed
    old ──> new   this: one text, then the descriptors: of listeners (metrics' and the control socket too), clients and
                  arenas in this order
    new     starts as ever, up to where it would read what clients send
    new ──> old   SERVING; the old one leaves, and the new one serves them

The word comes before the first byte of a client is read: whoever goes on without it has to find all of them.

Without that word (the new one ends, is silent for too long, or hangs up) the old one does what the new one would have:
it starts as ever, with what it had given away, which is its own still: the descriptors that travel are copies. One that
is silent may have opened arenas, and may come to itself: so the word has no way any more from then on, and the process
is ended. To whom it cannot be said any more, while the old one lives, does not serve.

An arena is served by whoever has locked it, be it a file with a name or without: whatever else goes wrong, never two.

The text is one JSON object, written by FORMAT; whoever asks says which it speaks, and is refused if that is another.
What may or may not be there (an arena's own format, arenas without names) has a word each: whoever asks says which it
KNOWS, and is refused for want of one that is needed. So no client waits for a process that could not go on. Who says
where it serves metrics is given what is listened on there, if it is the same place. If it is another port, or nowhere,
the old one listens on until then, and goes on there if it has to: a port that the system chose is not chosen twice.
Else, as one of the two may have a port's every address, that is closed by then.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nbdzram.config import TcpAddress
from nbdzram.engine.pool import ARENA_FORMAT
from nbdzram.errors import UserError
from nbdzram.nbd.constants import MetaContext, ReplyStyle, TransmissionFlag
from nbdzram.ready import readable
from nbdzram.receive import receive_exactly
from nbdzram.server.counts import ExportCount, PoolCount
from nbdzram.server.exports import Peer
from nbdzram.server.moments import Reached
from nbdzram.server.state import Kept, remembered_from
from nbdzram.server.steadily import steadily
from nbdzram.server.tls import TlsFiles
from nbdzram.status import HistorySample, from_json, to_json

FORMAT = 3
ARENA = f"arena-{ARENA_FORMAT}"  # arenas of this format can be opened
MEMORY = "memory"  # and such without a name
KNOWS = (ARENA, MEMORY)
METRICS = "metrics "  # behind it stands where they are
SERVING = b"serving\n"
DESCRIPTORS_AT_ONCE = 200  # of SCM_MAX_FD, 253; unix(7)
LONGEST_TEXT = 1 << 30  # a client's own is a few hundred bytes, and what came of its next request, 256 KiB at most
ANSWER_SECONDS = 15.0
"""For who takes over to serve, however little is stored; a process that died is noticed at once. All clients wait for
one that hangs: less than the 30 s after which Linux, by default, says that a request of its hangs."""
ANSWER_SECONDS_A_GIB = 0.5  # ... and for each GiB that is stored: ten times what opening takes
ENDING_SECONDS = 5.0
"""For a process that hung up to begin to end, if that is why it did. One that ends is waited for as long as that takes:
what it held, its memory too, is let go one after the other, and of hundreds of GiB that is more than this."""
PF_EXITING = 0x4  # include/linux/sched.h; of the flags in /proc/PID/stat, proc_pid_stat(5)
FLAGS_FIELD = 6  # ... counted behind the name
PEER = (socket.SOL_SOCKET, socket.SO_PEERCRED)
CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
GIB = 1 << 30
_LENGTH = struct.Struct(">I")

log = logging.getLogger("nbdzram.server")


@dataclass(slots=True)
class Client:
    """An attached client at rest, and its socket."""

    number: int
    export: str
    size_bytes: int  # that it was told
    style: ReplyStyle
    contexts: tuple[MetaContext, ...]
    flags: TransmissionFlag
    peer: Peer
    listener: str  # by which it came in
    since: float
    rest: bytes  # what came behind the last request that was answered
    connection: int  # the descriptor
    payload_limit: int | None = None  # the largest request that it was told; None: the other process did not say

    def text(self) -> dict[str, Any]:
        """All but the connection."""
        return {
            "number": self.number,
            "export": self.export,
            "size_bytes": self.size_bytes,
            "style": int(self.style),
            "contexts": [int(context) for context in self.contexts],
            "flags": int(self.flags),
            "peer": self.peer.text,
            "address": None if self.peer.address is None else str(self.peer.address),
            "local": self.peer.local,
            "account": self.peer.account,
            "listener": self.listener,
            "since": self.since,
            "rest": base64.b64encode(self.rest).decode(),
            "payload_limit": self.payload_limit,
        }

    @classmethod
    def of(cls, text: dict[str, Any], connection: int) -> Self:
        """What `text` told. Raises KeyError, TypeError, ValueError for what it cannot have told."""
        address = None if text["address"] is None else ipaddress.ip_address(text["address"])
        return cls(
            number=int(text["number"]),
            export=str(text["export"]),
            size_bytes=int(text["size_bytes"]),
            style=ReplyStyle(text["style"]),
            contexts=tuple(map(MetaContext, text["contexts"])),
            flags=TransmissionFlag(text["flags"]),
            peer=Peer(str(text["peer"]), address, local=bool(text["local"]), account=str(text["account"])),
            listener=str(text["listener"]),
            since=float(text["since"]),
            rest=base64.b64decode(text["rest"], validate=True),
            connection=connection,
            payload_limit=None if text.get("payload_limit") is None else int(text["payload_limit"]),
        )


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted since a server first started, however many processes it has been since."""

    accepted: int = 0
    protocol_errors: int = 0
    handshake_failures: dict[str, int] = field(default_factory=dict)
    last_client: int = 0  # the highest number that one had, of clients and of runs: none is used again
    last_run: int = 0
    exports: dict[str, ExportCount] = field(default_factory=dict)
    pools: dict[str, PoolCount] = field(default_factory=dict)
    history: tuple[HistorySample, ...] = ()


@dataclass(slots=True)
class Handover:
    """What is served."""

    listeners: list[socket.socket] = field(default_factory=list)
    uris: list[str] = field(default_factory=list)  # of the listeners, as clients name them by which they came in
    paths: list[tuple[Path, int]] = field(default_factory=list)  # files of unix sockets that we made, and their inodes
    control: socket.socket | None = None  # listens: who asks meanwhile is answered by the next, and none binds it
    metrics: list[socket.socket] = field(default_factory=list)  # listen, the same
    metrics_stay: bool = False  # they do not travel, but serve again whoever goes on himself
    clients: list[Client] = field(default_factory=list)
    counted: Counted = field(default_factory=Counted)
    kept: Kept = field(default_factory=Kept)
    reached: Reached | None = None  # where the journal ends, if it goes on
    tls: TlsFiles | None = None  # as they were read; they do not travel, but serve again whoever goes on himself
    stored_bytes: int = 0  # which are to be opened; it does not travel

    @property
    def was_served(self) -> bool:
        """A server had it until now, with or without addresses. Else it is what a start found."""
        return self.control is not None or bool(self.listeners)

    @property
    def comes_back(self) -> bool:
        """Whoever has it gave it away himself, and goes on: nobody else could."""
        return self.tls is not None

    @property
    def answer_seconds(self) -> float:
        """How long who takes it may be silent."""
        return ANSWER_SECONDS + ANSWER_SECONDS_A_GIB * self.stored_bytes / GIB

    def close(self) -> None:
        """Let all descriptors go: of clients, whose connections end unless another process has them, and arenas."""
        for listener in self._listeners_with(self.metrics):
            listener.close()
        for client in self.clients:
            os.close(client.connection)
        self.kept.close()

    def _listeners_with(self, metrics: list[socket.socket]) -> list[socket.socket]:
        return [*self.listeners, *metrics, *([self.control] if self.control is not None else ())]

    def give(self, to: socket.socket) -> None:
        """Send all of it; ours stays ours. Raises OSError."""
        metrics = [] if self.metrics_stay else self.metrics
        text = {
            "format": FORMAT,
            "listeners": len(self.listeners),
            "uris": self.uris,
            "metrics": len(metrics),
            "control": self.control is not None,
            "paths": [[str(path), inode] for path, inode in self.paths],
            "clients": [client.text() for client in self.clients],
            "counted": self.counted,
            "remembered": self.kept.remembered,
            "arenas": list(self.kept.arenas),
            "files": self.kept.files,
            "reached": self.reached,
        }
        encoded = to_json(text).encode()
        to.sendall(_LENGTH.pack(len(encoded)) + encoded)
        descriptors = [listener.fileno() for listener in self._listeners_with(metrics)]
        descriptors += [client.connection for client in self.clients]
        descriptors += self.kept.arenas.values()
        for start in range(0, len(descriptors), DESCRIPTORS_AT_ONCE):
            socket.send_fds(to, [b"."], descriptors[start : start + DESCRIPTORS_AT_ONCE])

    @classmethod
    def take(cls, giver: socket.socket) -> Self:
        """What the other process gives. Raises UserError; ConnectionError: it hangs up. Then nothing is ours."""
        with contextlib.ExitStack() as taken:
            try:
                handed = cls._taken(giver, taken)
            except ConnectionError:
                raise
            except (OSError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise UserError(f"the other server did not give away its connections: {error}") from None
            taken.pop_all()
            return handed

    @classmethod
    def _taken(cls, giver: socket.socket, taken: contextlib.ExitStack) -> Self:
        """The same; each descriptor, as soon as it is here, is closed with `taken`."""
        (length,) = _LENGTH.unpack(receive_exactly(giver.recv, _LENGTH.size, "it"))
        if length > LONGEST_TEXT:
            raise UserError(f"the other server gives {length} bytes of text; {LONGEST_TEXT} are the most")
        text = json.loads(receive_exactly(giver.recv, length, "it"))
        if text["format"] != FORMAT:
            raise UserError(f"the other server gives in format {text['format']}, this program takes {FORMAT}")
        clients_come_by, metrics = int(text["listeners"]), int(text.get("metrics", 0))
        if min(clients_come_by, metrics) < 0:
            raise ValueError("it listens on fewer sockets than none")
        listening = clients_come_by + metrics + bool(text["control"])
        wanted = listening + len(text["clients"]) + len(set(text["arenas"]))
        descriptors: list[int] = []
        while len(descriptors) < wanted:
            mark, some, flags, _ = socket.recv_fds(giver, 1, DESCRIPTORS_AT_ONCE)
            for descriptor in some:
                taken.callback(os.close, descriptor)
                os.set_inheritable(descriptor, False)
            descriptors += some
            if flags & socket.MSG_CTRUNC:
                raise UserError(
                    f"the other server gives {wanted} descriptors, and this process has places for {len(descriptors)}; "
                    "raise LimitNOFILE= or `ulimit -n`"
                )
            if not mark or not some:
                raise ConnectionError("it hung up")
        if len(descriptors) > wanted or not all(map(_is_socket, descriptors[:listening])):
            raise ValueError("its descriptors are not those that it names")
        given = iter(descriptors[listening:])
        handed = cls(
            clients=[Client.of(one, next(given)) for one in text["clients"]],
            kept=Kept(
                remembered_from(text["remembered"], "the other server"),
                {str(name): next(given) for name in text["arenas"]},
                files={str(pool): (int(device), int(inode)) for pool, (device, inode) in text.get("files", {}).items()},
            ),
            uris=[str(uri) for uri in text["uris"]],
            paths=[(Path(path), int(inode)) for path, inode in text["paths"]],
            counted=from_json(Counted, text["counted"], "the other server"),
            reached=from_json(Reached, text["reached"], "the other server") if text.get("reached") else None,
        )
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors[:listening]]  # nothing fails any more
        if text["control"]:
            handed.control = sockets.pop()
        handed.listeners, handed.metrics = sockets[:clients_come_by], sockets[clients_come_by:]
        return handed


@dataclass(frozen=True, slots=True)
class Successor:
    """A process that is about to take over."""

    line: socket.socket
    knows: frozenset[str]

    def serves_metrics_at(self, address: TcpAddress) -> bool:
        """It does, and so takes what is listened on there."""
        return metrics_at(address) in self.knows

    def leaves_ports(self, ports: Iterable[int]) -> bool:
        """It has said where its metrics are, and listens on none of these for them."""
        said = {word.rpartition(":")[2] for word in self.knows if word.startswith(METRICS)}
        return bool(said) and said.isdisjoint(map(str, ports))


def metrics_at(address: TcpAddress | None) -> str:
    """A word of what one KNOWS: that one's metrics are there, or nowhere."""
    return f"{METRICS}{address or 'off'}"


def _is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


def reach(path: Path) -> socket.socket:
    """A connection to the process that listens there to take over. Raises UserError."""
    try:
        successor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"it has no descriptors left: {error.strerror}; raise LimitNOFILE= or `ulimit -n`") from None
    try:
        successor.settimeout(ANSWER_SECONDS)
        successor.connect(str(path))
    except OSError as error:
        successor.close()
        remedy = "run both as one user" if isinstance(error, PermissionError) else "is it still there?"
        raise UserError(f"nothing can be given to {path}: {error.strerror or error}; {remedy}") from None
    return successor


def give_away(handover: Handover, successor: socket.socket) -> int | None:
    """Give all to it, and wait for its word. Its process's number; None: go on yourself, whatever was met here."""
    with successor, steadily("a takeover"), contextlib.suppress(OSError):
        process = int(CREDENTIALS.unpack(successor.getsockopt(*PEER, CREDENTIALS.size))[0])
        successor.settimeout(handover.answer_seconds)
        try:
            handover.give(successor)
            word = receive_exactly(successor.recv, len(SERVING), "it")
        except TimeoutError:
            word = _last_word(successor)
            if word != SERVING:
                _end(process, handover.answer_seconds)
        if word == SERVING:
            return process
    return None


def _last_word(successor: socket.socket) -> bytes:
    """What it has said by now: from here on it can say nothing, and so does not serve."""
    successor.shutdown(socket.SHUT_RDWR)
    return successor.recv(len(SERVING))


def _end(number: int, silent_seconds: float) -> None:
    """A process that was silent for too long, and wait until its arenas are free."""
    log.error("process %d wanted to take over, and was silent for %d s; it is ended", number, silent_seconds)
    try:
        process = os.pidfd_open(number)
    except OSError as error:  # it has ended, or lives where we do not see it
        log.warning("process %d is not found: %s", number, error.strerror)
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        while not has_ended(process):  # its arenas are ours again once it is, and nobody else can serve them until then
            log.warning("process %d is killed, and not gone yet; waiting for that", number)
    except PermissionError:
        log.warning("process %d is another user's, and cannot be ended", number)
    finally:
        os.close(process)


def has_ended(process: int) -> bool:
    """Whether a process, named by its descriptor, is gone; it may take a moment, and if it is ending its time."""
    while not readable(process, seconds=ENDING_SECONDS):
        if not _is_ending(process):
            return bool(readable(process, seconds=0))
    return True


def _is_ending(process: int) -> bool:
    """It runs no more, and has not let everything go yet. False: it runs, or is gone, or is hidden from us."""
    try:
        told = Path(f"/proc/self/fdinfo/{process}").read_text()
        (number,) = re.findall(r"^Pid:\s+(-?\d+)$", told, re.MULTILINE)
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return False
    return bool(int(fields[FLAGS_FIELD]) & PF_EXITING)
