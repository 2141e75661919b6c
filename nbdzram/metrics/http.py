"""A small HTTP/1.1 server for reading only: metrics, health, and the status page.

    GET /             the status page
    GET /metrics      Prometheus' text format
    GET /healthz      200 while the event loop runs
    GET /readyz       200 while clients are served, 503 while draining
    GET /status.json  what the page shows
    GET /usage.json   what each export's blocks cost, from a walk that the server repeats only so often

Bounded: a request's head, its time, the number of connections; one request a connection. There is no authentication
and nothing to change: whoever may reach the address may read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from itertools import chain

from nbdzram.config import TcpAddress
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import UserError
from nbdzram.metrics.exposition import CONTENT_TYPE
from nbdzram.metrics.families import FAMILIES
from nbdzram.metrics.page import load_page
from nbdzram.metrics.process import ProcessMetrics, resident_bytes
from nbdzram.slices import join_in_slices
from nbdzram.status import ServerStatus, fields, to_json_pieces

MAX_HEAD_BYTES = 8192  # browsers with cookies of other services on localhost send up to a few KiB
REQUEST_SECONDS = 5.0  # for the head to arrive, and again for the reply to leave
MAX_CONNECTIONS = 32  # a few scrapers and a few browser windows
SECURITY_HEADERS = "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nCache-Control: no-store\r\n"

log = logging.getLogger("nbdzram.metrics")

Answer = tuple[HTTPStatus, str, bytes]


class MetricsServer:
    """Listens on one address and answers from `status`."""

    def __init__(
        self,
        address: TcpAddress,
        status: Callable[[], ServerStatus],
        usage: Callable[[], Awaitable[Mapping[str, DiskUsage]]],
    ) -> None:
        self._address = address
        self._usage = usage
        self._status = status
        self._process = ProcessMetrics()
        self._page_content, self._policy = load_page()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._routes: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/": self._page,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status.json": self._status_json,
            "/usage.json": self._usage_json,
        }

    async def start(self) -> None:
        """Listen. Raises UserError."""
        address = self._address
        try:
            self._server = await asyncio.start_server(self._accept, address.host, address.port, limit=MAX_HEAD_BYTES)
        except OSError as error:  # asyncio's own text names the address a second time
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise UserError(
                f"cannot listen on {address} for metrics: {reason}; "
                f"choose another address with --metrics ADDR:PORT, or --metrics off"
            ) from error

    async def stop(self) -> None:
        """Stop listening and end the connections."""
        if self._server is None:
            return
        self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where the metrics are."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{dataclasses.replace(self._address, port=port)}/metrics"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self._connections.discard(done)
            writer.close()

        task.add_done_callback(forget)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            status, kind, body = await self._answer(head)
            head_only = head.startswith(b"HEAD ")
        except asyncio.LimitOverrunError:
            text = f"the request's head is longer than {MAX_HEAD_BYTES} bytes\n".encode()
            status, kind, body, head_only = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "text/plain", text, False
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return
        writer.write(_head(status, kind, len(body), self._policy) + (b"" if head_only else body))
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await writer.drain()
        except (ConnectionError, TimeoutError):
            writer.transport.abort()

    async def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
        target, _, version = rest.rpartition(" ")
        if not version.startswith("HTTP/1."):
            return HTTPStatus.BAD_REQUEST, "text/plain", b"this is not an HTTP/1 request\n"
        if method not in {"GET", "HEAD"}:
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD are served\n"
        route = self._routes.get(target.partition("?")[0])
        if route is None:
            there_are = ", ".join(self._routes)
            return HTTPStatus.NOT_FOUND, "text/plain", f"there is nothing here; there are {there_are}\n".encode()
        return await route()

    async def _metrics(self) -> Answer:
        """All families of one moment."""
        status = self._status()
        text = await join_in_slices(
            chain.from_iterable(family.lines(status) for family in FAMILIES), partial(asyncio.sleep, 0)
        )
        return HTTPStatus.OK, CONTENT_TYPE, (text + self._process.render()).encode()

    async def _healthz(self) -> Answer:
        return HTTPStatus.OK, "text/plain", b"ok\n"

    async def _readyz(self) -> Answer:
        if self._status().draining:
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"draining\n"
        return HTTPStatus.OK, "text/plain", b"ready\n"

    async def _status_json(self) -> Answer:
        return await _json(fields(self._status()) | {"resident_bytes": resident_bytes()})

    async def _usage_json(self) -> Answer:
        return await _json(await self._usage())

    async def _page(self) -> Answer:
        return HTTPStatus.OK, "text/html; charset=utf-8", self._page_content


async def _json(value: object) -> Answer:
    text = await join_in_slices(to_json_pieces(value), partial(asyncio.sleep, 0))
    return HTTPStatus.OK, "application/json", text.encode()


def _head(status: HTTPStatus, kind: str, length: int, policy: str) -> bytes:
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
        f"Content-Security-Policy: {policy}\r\n{SECURITY_HEADERS}Connection: close\r\n\r\n"
    ).encode("ascii")
