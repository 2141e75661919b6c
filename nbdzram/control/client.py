"""The control socket's client side, for the command line: plain blocking calls.

Records are made where they are asked for: most commands need one kind of the thirty (nbdzram/status). The socket is the
interpreter's own: what the module `socket` makes around it, enumerations of every constant, takes 2 ms, a twentieth of
a short command.
"""

from __future__ import annotations

import _socket
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nbdzram.control import messages
from nbdzram.control.paths import not_ours
from nbdzram.errors import NoSuchExport, ServerUnreachable, UserError
from nbdzram.ready import readable
from nbdzram.status.encoding import Record, from_json

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from nbdzram.engine.stats import DiskUsage
    from nbdzram.status import ClientStatus, RunStatus, ServerStatus

CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
LATE_SECONDS = 5.0
"""One that is well answers within milliseconds, or tells how far a run is every second: now it is said that it does not
(`late`), of every call. That is the one rule; a look, which asks nothing of the server but what it knows, ends then:"""
LOOK_SECONDS = 30.0  # from the beginning
LOOKS = {"status", "clients", "runs", "streams"}
ASKED_AGAIN = LOOKS | {"usage"}
"""What changes nothing is asked once more where the connection is cut off: another process may have taken over. So is
whatever the server that hung up had not read."""
HANGS = "it is stopped, hangs, or gets no processor"
CONNECT_SECONDS = 5.0  # a local server that lives accepts within microseconds

Progress = Callable[["RunStatus", "RunStatus | None"], None]


class Lost(ServerUnreachable):
    """The connection was cut off."""

    unread = False  # before the request was read: nothing of it is done


class ControlClient:
    """One connection to a server; a context manager."""

    def __init__(self, path: Path, late: Callable[[str], None] | None = None) -> None:
        """Connect. `late` hears of each call that is not answered for LATE_SECONDS. Raises ServerUnreachable."""
        self.late = late
        self.starting = False
        """It said so when its status was asked for: its disks are not all there yet."""
        self._path = path
        self._last_id = 0
        self._connect()

    def _connect(self) -> None:
        path = self._path
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._socket.settimeout(CONNECT_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            if isinstance(error, PermissionError):
                raise not_ours(path) from None
            if isinstance(error, ConnectionRefusedError) and not path.is_socket():
                raise ServerUnreachable(f"{path} is no socket; name the control socket that `serve` printed") from error
            reason = error.strerror or f"{error}: {len(os.fsencode(path))} bytes, of 107 at most"
            raise ServerUnreachable(f"no server answers on {path} ({reason}); is `nbdzram serve` running?") from error
        self._reader = io.BufferedReader(_Arriving(self._socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.starting and isinstance(value, NoSuchExport):
            raise UserError(f"{value}; but the server is starting, and has not opened all of its disks yet") from None

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self._socket.close()

    def renewed(self) -> bool:
        """Whether the server hung up while nothing was asked of it, as one does from which another takes over; then
        this is a connection to who answers now. Raises ServerUnreachable."""
        hung_up = bool(readable(self._socket.fileno(), seconds=0))
        if hung_up:
            self.close()
            self._connect()
        return hung_up

    @property
    def server_pid(self) -> int:
        """The process that listens there; 0: it lives in another namespace."""
        credentials = self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, CREDENTIALS.size)
        return int(CREDENTIALS.unpack(credentials)[0])

    def status(self) -> ServerStatus:
        """Everything that the server says of itself."""
        from nbdzram.status import ServerStatus  # noqa: PLC0415

        return self.status_as(ServerStatus)

    def status_as(self, kind: type[Record]) -> Record:
        """Of that, what a record of this kind has."""
        return from_json(kind, self._told())

    def status_part(self, what: str) -> list[Any]:
        """Of that, one list, as JSON types."""
        told = self._told()
        found = told.get(what) if isinstance(told, dict) else None
        if not isinstance(found, list):
            raise UserError(f"the server's answer lacks or misplaces '{what}'; was it written by another version?")
        return found

    def _told(self) -> Any:
        told = self.call("status")
        self.starting = isinstance(told, dict) and told.get("starting") is True
        return told

    def clients(self) -> tuple[ClientStatus, ...]:
        """Who is attached."""
        from nbdzram.status import ClientStatus  # noqa: PLC0415

        return tuple(from_json(ClientStatus, found) for found in self.call("clients"))

    def usage(self) -> dict[str, DiskUsage]:
        """What each export's blocks cost, by name; from a walk that takes about 15 ms a stored GiB."""
        from nbdzram.engine.stats import DiskUsage  # noqa: PLC0415

        return {name: from_json(DiskUsage, found) for name, found in self.call("usage").items()}

    def call(self, method: str, progress: Progress | None = None, **params: Any) -> Any:
        """The result of one call, as JSON types. Raises UserError and its kin as the server says."""
        return self._call(method, params, progress, None)

    def call_for_stream(self, method: str, write: Callable[[bytes], None], **params: Any) -> Any:
        """The same, of a method that sends bytes before it answers, to `write`. What that raises ends the call."""
        from nbdzram.stream.pipe import LENGTH  # noqa: PLC0415

        def pass_on() -> None:
            while (length := LENGTH.unpack(self._exactly(LENGTH.size))[0]) > 0:
                write(self._exactly(length))

        return self._call(method, params, None, pass_on)

    def call_with_stream(self, method: str, read: Callable[[int], bytes], **params: Any) -> Any:
        """The same, of a method that takes bytes: `read` gives up to so many, none at their end."""
        from nbdzram.stream.pipe import LARGEST_CHUNK, LENGTH  # noqa: PLC0415

        def pass_in() -> None:
            content = b"some"
            while content:
                content = read(LARGEST_CHUNK)
                try:
                    self._send(LENGTH.pack(len(content)) + content)
                except (BrokenPipeError, ConnectionResetError):  # refused: the reason has been sent
                    return

        return self._call(method, params, None, pass_in)

    def _call(
        self, method: str, params: dict[str, Any], progress: Progress | None, carry: Callable[[], None] | None
    ) -> Any:
        try:
            return self._ask(method, params, progress, carry)
        except Lost as lost:
            if method not in ASKED_AGAIN and not lost.unread:
                raise
            self.close()
            try:
                self._connect()
            except ServerUnreachable:
                raise lost from None
            return self._ask(method, params, progress, carry)

    def _ask(
        self, method: str, params: dict[str, Any], progress: Progress | None, carry: Callable[[], None] | None
    ) -> Any:
        self._last_id += 1
        limit_seconds = LOOK_SECONDS if method in LOOKS else None  # a fold may take minutes
        self._socket.settimeout(limit_seconds)
        refused = heard = False
        try:
            self._send(messages.request(method, params, self._last_id))
        except (BrokenPipeError, ConnectionResetError):  # the server hung up, and may have said why before
            refused = True
        if self.late is not None and not readable(self._socket.fileno(), seconds=LATE_SECONDS):
            self.late(self._unanswered(LATE_SECONDS))
            self._socket.settimeout(limit_seconds and limit_seconds - LATE_SECONDS)
        while True:
            try:
                message = self._receive()
            except Lost as lost:  # a reset: what was sent lay there unread when the server hung up, unix(7)
                lost.unread = not heard and (refused or isinstance(lost.__cause__, ConnectionResetError))
                raise
            heard = True
            if message.get("method") == "progress":
                if progress is not None:
                    _report(progress, message["params"])
            elif message.get("method") == "stream" and carry is not None:
                carry()
            elif "error" in message:
                raise messages.error_of(message["error"])
            elif message.get("id") == self._last_id:
                return message.get("result")

    def _send(self, content: bytes) -> None:
        """Commands let SIGPIPE end them, for pipes; a server that went away is an error to tell instead."""
        try:
            self._socket.sendall(content, _socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    def _exactly(self, count: int) -> bytes:
        content = self._heard(self._reader.read, count)
        if len(content) < count:
            raise self._lost("it closed the connection in the middle of a stream")
        return content

    def _receive(self) -> dict[str, Any]:
        line = self._heard(self._reader.readline, messages.MAX_REPLY_BYTES)
        if not line.endswith(b"\n"):
            raise self._lost("it closed the connection")
        try:
            message = json.loads(line)
        except ValueError:
            raise UserError(f"what answers on {self._path} is no nbdzram server") from None
        if not isinstance(message, dict):
            raise UserError(f"what answers on {self._path} is no nbdzram server")
        return message

    def _heard(self, read: Callable[[int], bytes], count: int) -> bytes:
        """What the server sent. Errors of this connection alone are the server's: those of whoever reads or writes a
        stream here, such as a disk that is full, are not.
        """
        try:
            return read(count)
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error

    def _silent(self) -> ServerUnreachable:
        return ServerUnreachable(f"{self._unanswered(LOOK_SECONDS)}: {HANGS}")

    def _unanswered(self, seconds: float) -> str:
        return f"the server on {self._path} (pid {self.server_pid}) has not answered for {seconds:g} s"

    def _lost(self, reason: str) -> Lost:
        return Lost(f"the server on {self._path} went away: {reason}")


class _Arriving(io.RawIOBase):
    """What a socket receives, as a file."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection

    def readable(self) -> bool:
        """It is for nothing else."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """As much as there is; waits for some as long as the socket does."""
        return self._connection.recv_into(buffer)


def _report(progress: Progress, params: dict[str, Any]) -> None:
    from nbdzram.status import RunStatus  # noqa: PLC0415

    ahead = params["waits_for"]
    progress(from_json(RunStatus, params["run"]), None if ahead is None else from_json(RunStatus, ahead))
