"""A small HTTP/1.1 server for reading only: metrics, health, and the status page (answers.py says what there is).

    accept: 5 each 50 ms ──> head: 32 places ──┬─> health: 16 places ──> reply, and gone
                             5 s               └─> answer: 64 places     10 s

1. Every stage has so many places. Who comes when all are taken gets that of whoever has held one longest: crowds of
   half requests, or of readers that do not read, make room for each other and keep nobody out.
2. Health has places of its own, and waits for no text that is being made.
3. A reply is not copied: all who wait for one text share its bytes, and what a client does not read stays with us, and
   a little of it with the system (unread.py), only until its deadline.
4. What strangers cost the event loop is bounded: connections a second here, the making of texts in answers.py. A task
   is made for a whole request only: until then a connection costs the accept, a read and the close.

One request a connection. There is no authentication and nothing to change: whoever may reach the address may read.
docs/decisions/0011-read-http-with-h11-on-the-loop.md says why it is not somebody else's server, nor on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus

from nbdzram.config import TcpAddress
from nbdzram.errors import UserError, reason_of
from nbdzram.listening import listen_on, look_up
from nbdzram.metrics.answers import HEALTH, Answer, Answers, Watched, sentence
from nbdzram.metrics.requests import MAX_HEAD_BYTES, Head, Hosts, Refused, Request
from nbdzram.unread import keep_little

HEAD_SECONDS = 5.0  # for the head to arrive
REPLY_SECONDS = 10.0  # for the reply to leave: as long as Prometheus waits by itself
HEAD_PLACES = 32
ANSWER_PLACES = 64  # a few scrapers and a few browser windows, and 30 scrapers that somebody configured by mistake
HEALTH_PLACES = 16
BURST = 5  # are accepted at once: a page asks for three things
BURST_PAUSE_SECONDS = 0.05  # until the next: 100 a second, and the loop is woken 20 times for them
BACKLOG = 128  # that wait to be accepted meanwhile
ACCEPT_PAUSE_SECONDS = 1.0  # when there is no descriptor to accept with
FINISH_SECONDS = 2.0  # of who leaves, for those who had asked
DISCARDED_BYTES = 64 << 10  # of what a client still sends while its reply leaves, so that it is not answered by a reset
FORGET, REMEMBER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)  # what was not taken yet when a socket is closed
SECURITY_HEADERS = "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"

log = logging.getLogger("nbdzram.metrics")


class MetricsServer:
    """Listens on one address and answers from what `watched` says."""

    def __init__(
        self,
        address: TcpAddress,
        watched: Watched,
        hosts: Iterable[str] = (),
    ) -> None:
        self.address = address
        self._hosts = Hosts({address.host.lower(), *hosts})
        self._answers = Answers(watched)
        self._heads = Heads(self._begin)
        self._replies = Places(ANSWER_PLACES)
        self._health = Places(HEALTH_PLACES)
        self._listeners: list[socket.socket] = []
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, listening: Sequence[socket.socket] = ()) -> None:
        """Listen; on what another process, or an earlier server, did, if there is that: who comes there waits for
        `accept`. Raises UserError."""
        self._listeners = list(listening) or await _listen(self.address)
        if not listening:
            self.accept()

    def accept(self) -> None:
        """Let in who comes."""
        for listener in self._listeners:
            self._listen(listener)

    def accept_no_more(self) -> None:
        """Who comes waits for another process, or a later server. Who was let in is heard and answered."""
        for pause in self._pauses.values():
            pause.cancel()
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def surrender(self) -> list[socket.socket]:
        """What it listens on, and accepts nobody on any more: the caller's, and not closed by `stop`."""
        listening, self._listeners = self._listeners, []
        return listening

    async def finish(self) -> None:
        """As stop, once those are answered whose request is whole; there is no need to rest between texts any more."""
        self.accept_no_more()
        self._heads.close()
        self._answers.hurry()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=FINISH_SECONDS)
        await self.stop()

    async def stop(self) -> None:
        """Stop listening and end the connections."""
        self._answers.stop()
        self.accept_no_more()
        for listener in self.surrender():
            listener.close()
        self._heads.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ports(self) -> list[int]:
        """Of what it listens on; the system may choose one for each address."""
        return [listener.getsockname()[1] for listener in self._listeners]

    @property
    def url(self) -> str:
        """Where the metrics are."""
        port = self.ports[0]
        where = str(dataclasses.replace(self.address, port=port)).replace("%", "%25")  # of an interface: RFC 6874
        return f"http://{where}/metrics"

    def _listen(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Let some of those who wait in; the others do so in the system's queue, which costs the loop nothing."""
        pause_seconds = BURST_PAUSE_SECONDS
        for _ in range(BURST):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            except OSError as error:
                log.warning("cannot accept a connection for metrics: %s", error.strerror)
                pause_seconds = ACCEPT_PAUSE_SECONDS
                break
            client.setblocking(False)
            self._heads.admit(client)
        asyncio.get_running_loop().remove_reader(listener)
        self._pauses[listener] = asyncio.get_running_loop().call_later(pause_seconds, self._listen, listener)

    def _begin(self, client: socket.socket, asked: Request | Refused) -> None:
        task = asyncio.ensure_future(self._serve(client, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket, asked: Request | Refused) -> None:
        with contextlib.closing(client), contextlib.suppress(OSError, TimeoutError):
            try:
                if isinstance(asked, Refused):
                    raise asked
                await self._reply(client, asked)
            except Refused as refused:
                answer = dataclasses.replace(sentence(refused.status, str(refused)), headers=refused.headers)
                with self._replies.taken():
                    await self._send(client, answer, head_only=isinstance(asked, Request) and asked.head_only)

    async def _reply(self, client: socket.socket, request: Request) -> None:
        health = request.path in HEALTH
        if not health:
            self._hosts.require(request.host)
        with (self._health if health else self._replies).taken():
            answer = await self._answers.answer(request.path)
            await self._send(client, answer, head_only=request.head_only)

    async def _send(self, client: socket.socket, answer: Answer, *, head_only: bool = False) -> None:
        loop = asyncio.get_running_loop()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, FORGET)  # cut, it leaves nothing to the system
        async with asyncio.timeout(REPLY_SECONDS):
            await loop.sock_sendall(client, _head(answer, self._answers.policy))
            if not head_only:
                await loop.sock_sendall(client, answer.body)
            client.shutdown(socket.SHUT_WR)
            left = DISCARDED_BYTES
            while left > 0 and (piece := await loop.sock_recv(client, left)):
                left -= len(piece)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, REMEMBER)


class Heads:
    """Connections whose request is not whole yet: HEAD_PLACES at once; the one that came first makes room."""

    def __init__(self, whole: Callable[[socket.socket, Request | Refused], None]) -> None:
        self._whole = whole
        self._deadlines: dict[socket.socket, asyncio.TimerHandle] = {}

    def admit(self, client: socket.socket) -> None:
        """Hear it out, within HEAD_SECONDS."""
        if len(self._deadlines) >= HEAD_PLACES:
            self._drop(next(iter(self._deadlines)))
        loop = asyncio.get_running_loop()
        self._deadlines[client] = loop.call_later(HEAD_SECONDS, self._drop, client)
        loop.add_reader(client, self._receive, client, Head())

    def close(self) -> None:
        """Hear nobody any more."""
        for client in tuple(self._deadlines):
            self._drop(client)

    def _receive(self, client: socket.socket, head: Head) -> None:
        """Until nothing is left: of a reset uvloop tells once, and what came before it is read first."""
        asked: Request | Refused | None = None
        try:
            while asked is None:
                piece = client.recv(MAX_HEAD_BYTES)
                if not piece:
                    raise EOFError
                asked = head.receive(piece)
        except BlockingIOError:
            return
        except (OSError, EOFError):
            self._drop(client)
            return
        except Refused as refused:
            asked = refused
        self._let_go(client)
        self._whole(client, asked)

    def _drop(self, client: socket.socket) -> None:
        self._let_go(client)
        client.close()

    def _let_go(self, client: socket.socket) -> None:
        self._deadlines.pop(client).cancel()
        asyncio.get_running_loop().remove_reader(client)


class Places:
    """So many tasks at once; the one that came first makes room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: dict[asyncio.Task[None], None] = {}

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """The current task has a place."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= self._limit:
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()
        self._tasks[task] = None
        try:
            yield
        finally:
            self._tasks.pop(task, None)


async def _listen(address: TcpAddress) -> list[socket.socket]:
    """A socket for each address that the host name stands for and this machine has. Raises UserError."""
    try:
        found = await asyncio.to_thread(look_up, address)  # uvloop's own leaves out a link-local address's interface
        opened, lacking = listen_on(found, BACKLOG, _prepare)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else reason_of(error)
        raise UserError(
            f"cannot listen on {address} for metrics: {reason}; "
            f"choose another address with --metrics ADDR:PORT, or --metrics off"
        ) from error
    for host, lack in lacking:
        log.warning("metrics are not served on %s, for which %s stands too: %s", host, address, lack.strerror)
    return opened


def _prepare(listener: socket.socket) -> None:
    listener.setblocking(False)
    keep_little(listener, REPLY_SECONDS)


def _head(answer: Answer, policy: str) -> bytes:
    status, more = HTTPStatus(answer.status), "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {answer.kind}\r\n"
        f"Content-Length: {len(answer.body)}\r\n{more}"
        f"Content-Security-Policy: {policy}\r\n{SECURITY_HEADERS}Connection: close\r\n\r\n"
    ).encode("ascii")
