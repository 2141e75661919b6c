"""The control socket's server side: a unix socket that only its owner may open.

A connection's requests are served one after another; several connections at once. A run that a client asked for goes
on if the client hangs up.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nbdzram.control import messages
from nbdzram.control.messages import Code, MessageError, Request
from nbdzram.control.methods import Method
from nbdzram.errors import NbdzramError, UserError
from nbdzram.slices import join_in_slices

MAX_CONNECTIONS = 64  # people and scripts of one owner
MAX_QUEUED_BYTES = 64 << 10  # progress is left out while a client has that much unread

log = logging.getLogger("nbdzram.control")


class ControlServer:
    """Serves the method table on a unix socket of mode 0600."""

    def __init__(self, path: Path, methods: Mapping[str, Method]) -> None:
        self.path = path
        self._methods = methods
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Bind and listen. Raises UserError."""
        listening = _bind(self.path)
        self._inode = self.path.stat().st_ino
        self._server = await asyncio.start_unix_server(self._accept, sock=listening, limit=messages.MAX_REQUEST_BYTES)

    async def stop(self) -> None:
        """Stop listening, end the connections, remove the socket if it is still ours."""
        if self._server is None:
            return
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._converse(reader, writer))
        self._connections.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._connections.discard(done)
            writer.close()

        task.add_done_callback(forget)  # also for a task that is cancelled before its first step

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._connections) <= MAX_CONNECTIONS:
                await self._serve(reader, writer)
            else:
                writer.write(messages.failure(None, Code.REFUSED, f"more than {MAX_CONNECTIONS} control connections"))
                await writer.drain()
        except ConnectionError:
            pass  # the client hung up: nobody waits for the answer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # the reader's limit; where the next message starts is unknown
                text = f"a request is longer than {messages.MAX_REQUEST_BYTES} bytes"
                writer.write(messages.failure(None, Code.INVALID_REQUEST, text))
                return await writer.drain()
            if not line.endswith(b"\n"):
                return None
            answer = await self._answer(line, writer)
            if writer.transport.is_closing():
                return None  # the client hung up during a run: nobody waits for the answer
            if answer is not None:
                writer.write(answer)
                await writer.drain()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> bytes | None:
        request = Request("", {}, None)
        try:
            request = messages.parse_request(line)
            return await self._perform(request, writer)
        except MessageError as error:
            return messages.failure(error.request_id or request.id, error.code, str(error))
        except UserError as error:
            return messages.failure(request.id, Code.REFUSED, str(error), error)
        except (NbdzramError, AssertionError, LookupError, TypeError, ValueError, OSError, RuntimeError) as error:
            log.exception("the control request %s failed", request.method)
            return messages.failure(request.id, Code.INTERNAL_ERROR, f"{request.method} failed: {error}")

    async def _perform(self, request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        method = self._methods.get(request.method)
        if method is None:
            known = ", ".join(sorted(self._methods))
            raise MessageError(Code.METHOD_NOT_FOUND, f"no method '{request.method[:80]}'; there are {known}")
        given = method.read(request.params)

        def progress(kind: str, pool: str, done: int, total: int) -> None:
            transport = writer.transport
            if not transport.is_closing() and transport.get_write_buffer_size() < MAX_QUEUED_BYTES:
                writer.write(messages.progress(request.id, kind, pool, done, total))

        value = await method.call(given, progress)
        if request.id is None:
            return None
        return (await join_in_slices(messages.result(request.id, value), partial(asyncio.sleep, 0))).encode()


def _bind(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600; one that a dead server left is replaced. Raises UserError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # the mode holds from the first instant; only start-up code runs meanwhile
    try:
        if path.is_socket():
            _remove_stale(path)
        listening.bind(str(path))
        listening.listen(MAX_CONNECTIONS)
    except OSError as error:
        listening.close()
        reason = f"{path} is no socket" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise UserError(f"cannot make the control socket {path}: {reason}; name another with --control PATH") from error
    except UserError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    listening.setblocking(False)
    return listening


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a server that lives but hangs does not hang us
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise UserError(
        f"another server answers on the control socket {path}; stop it, or give this one --control, -p and --metrics "
        f"of its own"
    )
