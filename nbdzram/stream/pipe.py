"""The bytes of a stream over a socket: chunks, an end mark, and an end that somebody can make from another thread.

    chunk   length 4, big endian | so many bytes
    end     length 0

Without the end mark who reads knows that who wrote went away. A stream that is ended before its time gets its mark too,
behind the rest of its chunk, so that the reason can be told behind it.

The socket may be in the hands of an event loop at the same time: it is only polled and used without waiting, and its
mode stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time

from nbdzram.errors import StreamCut, StreamError

LENGTH = struct.Struct(">I")
LARGEST_CHUNK = 1 << 20
SETTLING_SECONDS = 1.0
"""For who reads a stream that is ended, to read the rest of its chunk. A command that is well does within milliseconds;
one whose own reader stands still must not keep the server from ending."""


class Pipe:
    """One direction of one connection. read and write block, on one thread; cancel comes from any."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._cancelled: str | None = None
        self._left = 0  # of the chunk that is being read
        self._unsent: list[memoryview] = []  # of the chunk that is being written
        self._marked = False  # the end mark is sent, or among that
        self._ended = False

    def close(self) -> None:
        """Let the descriptors go; the connection stays open where somebody else has it."""
        self._socket.close()
        os.close(self._wake)

    def cancel(self, reason: str) -> None:
        """Whoever reads or writes ends with a StreamError that says this."""
        self._cancelled = self._cancelled or reason
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def write(self, content: bytes) -> None:
        """Send it as chunks. Raises StreamError: cancelled, or (StreamCut) nobody reads any more."""
        for start in range(0, len(content), LARGEST_CHUNK):
            self._require_going_on()  # what is not begun by then is not begun
            part = memoryview(content)[start : start + LARGEST_CHUNK]
            self._unsent = [memoryview(LENGTH.pack(len(part))), part]
            self._send()

    def end(self) -> None:
        """Nothing more comes."""
        self._require_going_on()
        self._mark_end()
        self._send()
        self._ended = True

    def settle(self, *, inward: bool) -> bool:
        """Whether what follows on the connection can be told from the stream, which has ended, well or not.

        A stream that is written gets the rest of its chunk and its end mark, if it has not, and they are read in time.
        Blocks so long.
        """
        if self._ended or inward:
            return self._ended
        self._mark_end()
        until = time.monotonic() + SETTLING_SECONDS
        with contextlib.suppress(OSError):
            while self._unsent:
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if not poll.poll(max(until - time.monotonic(), 0.0) * 1000):
                    return False
                with contextlib.suppress(BlockingIOError):
                    self._pass_on()
            self._ended = True
        return self._ended

    def read(self, count: int) -> bytes:
        """Up to so many bytes; none at the end mark. Raises StreamError: cancelled; or StreamCut: cut off before it."""
        if self._ended:
            return b""
        if not self._left:
            (self._left,) = LENGTH.unpack(self._exactly(LENGTH.size))
            if self._left > LARGEST_CHUNK:
                raise StreamError(
                    f"a chunk of a stream has {self._left} bytes, over {LARGEST_CHUNK}: it is none of ours"
                )
            self._ended = self._left == 0
        part = self._receive(min(count, self._left)) if self._left else b""
        self._left -= len(part)
        return part

    def _exactly(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            parts += self._receive(count - len(parts))
        return parts

    def _receive(self, count: int) -> bytes:
        while True:
            try:
                part = self._socket.recv(count, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise StreamCut(f"the stream was cut off: {error.strerror}") from None
            if not part:
                raise StreamCut("the stream was cut off: whoever sent it went away")
            self._require_going_on()
            return part

    def _mark_end(self) -> None:
        """Behind what is left, once."""
        if not self._marked:
            self._unsent.append(memoryview(LENGTH.pack(0)))
            self._marked = True

    def _send(self) -> None:
        while self._unsent:
            self._require_going_on()
            try:
                self._pass_on()
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise StreamCut(f"nobody reads the stream any more: {error.strerror}") from None

    def _pass_on(self) -> None:
        """As much as can be sent at once of the first part that is left. Raises OSError."""
        first = self._unsent[0]
        self._unsent[0] = first[self._socket.send(first, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        if not self._unsent[0]:
            del self._unsent[0]

    def _wait(self, for_what: int) -> None:
        poll = select.poll()
        poll.register(self._socket, for_what)
        poll.register(self._wake, select.POLLIN)
        poll.poll()
        self._require_going_on()

    def _require_going_on(self) -> None:
        if self._cancelled is not None:
            raise StreamError(self._cancelled)
