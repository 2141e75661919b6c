"""The control socket's server side: a unix socket that only its owner may open.

A connection's requests are served one after another; several connections at once. What a client asked for goes on if
the client hangs up.

A connection waits (for its peer to ask, or to read the answer) or performs. There are MAX_CONNECTIONS at most: a
newcomer takes the place of one whose peer is gone, else of that which has been waiting longest, and is refused only if
all of them perform. Who never asked for anything is given FIRST_SECONDS, later silence may last IDLE_SECONDS. So
neither forgotten nor hostile connections keep the operator out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from nbdzram.control import messages
from nbdzram.control.audit import Act, Audit, Caller
from nbdzram.control.messages import Code, MessageError, Request
from nbdzram.control.methods import Method, StreamMethod
from nbdzram.errors import NbdzramError, UserError
from nbdzram.slices import join_in_slices
from nbdzram.status import RunStatus
from nbdzram.stream.pipe import Pipe

MAX_CONNECTIONS = 64  # people and scripts of one owner
MAX_QUEUED_BYTES = 64 << 10  # progress is left out while a client has that much unread
FIRST_SECONDS = 10.0  # to the end of the first request: commands send theirs at once
ANSWERING_SECONDS = 1.0  # at the server's end, for answers to what was performed: commands read them at once
IDLE_SECONDS = 3900.0  # between two: `nbdzram top` asks once an hour at the least
CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid

log = logging.getLogger("nbdzram.control")


class Conversation:
    """One connection: whether it waits, since when, and who is at the other end."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.caller = _caller_of(path, writer)
        self.spoke = False
        self.over = False  # after this answer: where its next request would begin is not known
        self.waiting_since: float | None = time.monotonic()  # None: it performs
        self.hears = True  # it waits for a request

    @property
    def gone(self) -> bool:
        """The peer hung up. Only what it asked for may still be under way."""
        return self.writer.transport.is_closing() or self.reader.at_eof()

    @property
    def patience(self) -> float:
        """How long its silence may last, in seconds."""
        return IDLE_SECONDS if self.spoke else FIRST_SECONDS

    async def hear(self) -> bytes:
        """The next line; not a whole one at the end. Raises ValueError for one that is too long, TimeoutError."""
        self.waiting_since, self.hears = time.monotonic(), True
        async with asyncio.timeout(self.patience):
            line = await self.reader.readline()
        self.waiting_since, self.hears = None, False
        self.spoke = True
        return line

    def hear_no_more(self) -> None:
        """What has come whole is heard still; the rest stays where it is, and its peer learns that nobody read it."""
        cast(asyncio.Transport, self.writer.transport).pause_reading()
        self.reader.feed_eof()

    def tell(self, answer: bytes | bytearray) -> None:
        """Send without waiting. Who hung up is told nothing: what is written to a transport that is closed, raises."""
        if not self.writer.transport.is_closing():
            self.writer.write(answer)

    async def say(self, answer: bytes | bytearray) -> None:
        """Send, and wait until the peer reads it. Raises TimeoutError."""
        self.waiting_since = time.monotonic()
        self.tell(answer)
        async with asyncio.timeout(self.patience):
            await self.writer.drain()


class ControlServer:
    """Serves the method table on a unix socket of mode 0600."""

    def __init__(
        self,
        path: Path,
        methods: Mapping[str, Method | StreamMethod],
        audit: Audit | None = None,
        *,
        listening: socket.socket | None = None,
    ) -> None:
        """`listening`: what another process had bound there, which is ours from now on."""
        self.path = path
        self._listening = listening
        self._methods = methods
        self._audit = audit or Audit(None)
        self._server: asyncio.Server | None = None
        self._conversations: dict[asyncio.Task[None], Conversation] = {}
        self._acts: set[asyncio.Task[Any]] = set()
        self._inode = 0

    async def start(self, *, accept: bool = True) -> None:
        """Bind and listen. Raises UserError. `accept`: at once, and not from `accept` on."""
        if self._listening is None:
            self._listening = _bind(self.path)
        self._listening.setblocking(False)
        with contextlib.suppress(OSError):  # somebody removed it: then there is none of ours to remove
            self._inode = self.path.stat().st_ino
        # The loop's copy goes with the server; and the file is ours to remove, or to give away.
        as_it_is: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await asyncio.start_unix_server(
            self._accept,
            sock=self._listening.dup(),
            limit=messages.MAX_REQUEST_BYTES,
            backlog=MAX_CONNECTIONS,
            start_serving=accept,
            **as_it_is,
        )

    async def accept(self) -> None:
        """Hear whoever has connected since `start`, and whoever connects. Nothing can be in its way any more."""
        assert self._server is not None
        await self._server.start_serving()

    def surrender(self) -> socket.socket:
        """What it listens on, for another process or a later server: the caller's, and not closed by `stop`."""
        assert self._listening is not None
        listening, self._listening = self._listening, None
        return listening

    async def stop(self) -> None:
        """Stop listening, answer what was performed, end the connections, remove the socket if it is still ours."""
        if self._server is None:
            return
        self._server.close()
        conversations = dict(self._conversations)
        for task, conversation in conversations.items():
            conversation.over = True
            if conversation.hears:
                conversation.hear_no_more()
            elif conversation.waiting_since is not None:
                task.cancel()
        await asyncio.gather(*self._acts, return_exceptions=True)
        if conversations:
            await asyncio.wait(conversations, timeout=ANSWERING_SECONDS)
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        if self._listening is None:
            return
        self._listening.close()
        with contextlib.suppress(OSError):  # it is gone already, or lies where we may not look any more
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            conversation = Conversation(self.path, reader, writer)
        except OSError as error:  # no descriptor to ask the kernel with, and nobody acts unknown
            _turn_away(writer, f"cannot tell who connects: {error.strerror}; raise LimitNOFILE= or `ulimit -n`")
            return
        if not self._make_room():
            text = (
                f"all {MAX_CONNECTIONS} control connections are at work on requests; wait until one of them has ended"
            )
            _turn_away(writer, text)
            return
        task = asyncio.create_task(self._converse(conversation))
        self._conversations[task] = conversation

        def forget(done: asyncio.Task[None]) -> None:
            self._conversations.pop(done, None)
            writer.close()

        task.add_done_callback(forget)  # also for a task that is cancelled before its first step

    def _make_room(self) -> bool:
        """Whether there is a place, or one could be made."""
        if len(self._conversations) < MAX_CONNECTIONS:
            return True
        waiting = [
            (not conversation.gone, conversation.waiting_since or 0.0, task)
            for task, conversation in self._conversations.items()
            if conversation.gone or conversation.waiting_since is not None
        ]
        if not waiting:
            return False
        *_, task = min(waiting, key=lambda each: each[:2])
        longest = self._conversations.pop(task)
        text = f"more than {MAX_CONNECTIONS} control connections: this one, silent for the longest time, made room"
        longest.tell(messages.failure(None, Code.REFUSED, text))
        task.cancel()
        return True

    async def _converse(self, conversation: Conversation) -> None:
        try:
            await self._serve(conversation)
        except TimeoutError:
            text = f"this control connection was silent for {conversation.patience:g} s"
            conversation.tell(messages.failure(None, Code.REFUSED, text))
        except ConnectionError:
            pass  # the client hung up: nobody waits for the answer

    async def _serve(self, conversation: Conversation) -> None:
        while True:
            try:
                line = await conversation.hear()
            except ValueError:  # the reader's limit; where the next message starts is unknown
                text = f"a request is longer than {messages.MAX_REQUEST_BYTES} bytes"
                return await conversation.say(messages.failure(None, Code.INVALID_REQUEST, text))
            if not line.endswith(b"\n"):
                return None
            answer = await self._answer(line, conversation)
            if conversation.writer.transport.is_closing():
                return None  # the client hung up during a run: nobody waits for the answer
            if answer is not None:
                await conversation.say(answer)
            if conversation.over:
                return None

    async def _answer(self, line: bytes, conversation: Conversation) -> bytes | bytearray | None:
        request = Request("", {}, None)
        try:
            request = messages.parse_request(line)
            return await self._perform(request, conversation)
        except MessageError as error:
            return messages.failure(error.request_id or request.id, error.code, str(error))
        except UserError as error:
            return messages.failure(request.id, Code.REFUSED, str(error), error)
        except _OUR_BUGS as error:
            log.exception("the control request %s failed", request.method)
            return messages.failure(request.id, Code.INTERNAL_ERROR, f"{request.method} failed: {error}")

    async def _perform(self, request: Request, conversation: Conversation) -> bytes | bytearray | None:
        method = self._methods.get(request.method)
        if method is None:
            known = ", ".join(sorted(self._methods))
            raise MessageError(Code.METHOD_NOT_FOUND, f"no method '{request.method[:80]}'; there are {known}")
        given = method.read(request.params)
        if isinstance(method, StreamMethod):
            value = await self._carry(request, method, given, conversation)
            return "".join(messages.result(request.id, value)).encode()
        writer = conversation.writer

        def progress(run: RunStatus, waits_for: RunStatus | None) -> None:
            transport = writer.transport
            if not transport.is_closing() and transport.get_write_buffer_size() < MAX_QUEUED_BYTES:
                writer.write(messages.progress(request.id, run, waits_for))

        call = method.call(given, progress)
        value = await (self._act(request, call, conversation.caller) if method.is_act else call)
        if request.id is None:
            return None
        return await join_in_slices(messages.result(request.id, value), partial(asyncio.sleep, 0))

    async def _carry(
        self, request: Request, method: StreamMethod, given: Mapping[str, Any], conversation: Conversation
    ) -> Any:
        """Let the method read or write the connection itself; asyncio does neither meanwhile."""
        transport = cast(asyncio.Transport, conversation.writer.transport)
        pipe = Pipe(socket.socket(fileno=os.dup(conversation.writer.get_extra_info("socket").fileno())))

        async def carry() -> Any:
            try:
                return await method.carry(given, pipe)
            finally:
                conversation.over = not await asyncio.to_thread(pipe.settle, inward=method.inward)
                pipe.close()

        if method.inward:
            transport.pause_reading()
        transport.set_write_buffer_limits(high=0)  # so that drain means: all of it is sent
        try:
            conversation.writer.write(messages.stream(request.id))
            await conversation.writer.drain()
        except BaseException:
            pipe.close()
            raise
        try:
            return await self._act(request, carry(), conversation.caller)
        except asyncio.CancelledError:
            pipe.cancel("the control connection was ended")
            raise
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits()
                if method.inward:
                    transport.resume_reading()

    async def _act(self, request: Request, call: Awaitable[Any], caller: Caller) -> Any:
        """Perform and note what came of it, in a task of its own: who hangs up ends neither."""
        task = asyncio.create_task(self._perform_and_note(request, call, caller))
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)
        return await asyncio.shield(task)

    async def _perform_and_note(self, request: Request, call: Awaitable[Any], caller: Caller) -> Any:
        began, result = time.monotonic(), "done"
        try:
            return await call
        except BaseException as error:
            result = f"failed: {error or type(error).__name__}"
            raise
        finally:
            await self._audit.note(Act(caller, request.method, request.params, result, time.monotonic() - began))


_OUR_BUGS = (
    NbdzramError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a request may meet that nobody foresaw: logged with its trace, and the conversation goes on."""


def _turn_away(writer: asyncio.StreamWriter, text: str) -> None:
    writer.write(messages.failure(None, Code.REFUSED, text))
    writer.close()


def _caller_of(path: Path, writer: asyncio.StreamWriter) -> Caller:
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as peer:
        pid, uid, _ = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return Caller(uid=uid, pid=pid, socket=str(path))


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
            whose = ""
        else:
            pid, _, _ = CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
            whose = f" (process {pid})" if pid else ""  # 0: it lives in another namespace
    raise UserError(
        f"another server answers on the control socket {path}{whose}; stop it, or give this one --control, -p and "
        f"--metrics of its own"
    )
