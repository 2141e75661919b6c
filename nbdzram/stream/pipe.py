"""The bytes of a stream over a socket: chunks, an end mark, and an end that somebody can make from another thread.

    chunk   length 4, big endian | so many bytes
    end     length 0

Without the end mark who reads knows that who wrote went away. Who is made to end in the middle of a chunk sends the
rest of it, if that is taken soon, so that the mark, and the reason behind it, can follow. The socket may be in the
hands of an event loop at the same time: it is only polled and used without waiting, and its mode stays as it is.
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
REST_SECONDS = 1.0
"""For the rest of a chunk: who reads at all takes it in that time."""


class Pipe:
    """One direction of one connection. read and write block, on one thread; cancel comes from any."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._cancelled: str | None = None
        self._until = 0.0  # by the monotonic clock: for the rest of a chunk, once it is cancelled
        self._left = 0  # of the chunk that is being read
        self._within = False  # a chunk that is being written
        self._ended = False

    def close(self) -> None:
        """Let the descriptors go; the connection stays open where somebody else has it."""
        self._socket.close()
        os.close(self._wake)

    def cancel(self, reason: str) -> None:
        """Whoever reads or writes ends with a StreamError that says this."""
        if self._cancelled is None:
            self._until = time.monotonic() + REST_SECONDS
        self._cancelled = self._cancelled or reason
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def write(self, content: bytes) -> None:
        """Send it as chunks. Raises StreamError: cancelled, or (StreamCut) nobody reads any more."""
        for start in range(0, len(content), LARGEST_CHUNK):
            self._require_going_on()
            part = memoryview(content)[start : start + LARGEST_CHUNK]
            self._within = True
            self._send(memoryview(LENGTH.pack(len(part))))
            self._send(part)
            self._within = False

    def end(self) -> None:
        """Nothing more comes."""
        self._require_going_on()
        self._within = True
        self._send(memoryview(LENGTH.pack(0)))
        self._within, self._ended = False, True

    def settle(self, *, inward: bool) -> bool:
        """Whether what follows on the connection can be told from the stream, which has ended, well or not.

        A stream that is written gets its end mark, if that can be sent at once and is not sent yet.
        """
        if self._ended or inward:
            return self._ended
        if self._within:
            return False
        with contextlib.suppress(OSError):
            self._ended = self._socket.send(LENGTH.pack(0), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == LENGTH.size
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

    def _send(self, content: memoryview) -> None:
        while content:
            try:
                content = content[self._socket.send(content, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise StreamCut(f"nobody reads the stream any more: {error.strerror}") from None

    def _wait(self, for_what: int) -> None:
        poll = select.poll()
        poll.register(self._socket, for_what)
        if self._cancelled is None:
            poll.register(self._wake, select.POLLIN)
            poll.poll()
            if self._within:
                return
        elif self._within and poll.poll(max(self._until - time.monotonic(), 0) * 1000):
            return
        self._require_going_on()

    def _require_going_on(self) -> None:
        if self._cancelled is not None:
            raise StreamError(self._cancelled)
