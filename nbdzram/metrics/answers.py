"""What the metrics server answers: a table of paths, each with what makes its content.

    GET /             the status page
    GET /metrics      Prometheus' text format
    GET /healthz      200 while the event loop runs
    GET /readyz       200 while clients are served, 503 while starting or draining
    GET /status.json  what the page shows
    GET /clients.json who is attached
    GET /history.json the last two hours, a sample each ten seconds
    GET /history/NAME the same of one export, its name percent-encoded; of the 256 that did something last
    GET /usage.json   what each export's blocks cost, as the last walk found it; the header Age says how long ago

A long text is made once for all who ask meanwhile, and at leisure: after making one for t seconds the server rests for
REST times t. So however many scrape, what they cost the event loop is at most 1/(REST + 1) of it. Nobody gets a text
that was finished before it was asked for.

Known limits: whoever asks again at once waits for the rest to end, 90 ms with 100 exports, 5 s with 4,000.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Protocol
from urllib.parse import unquote

from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import NoSuchExport
from nbdzram.metrics.coarse import for_strangers, history_for_strangers, in_steps, usage_for_strangers
from nbdzram.metrics.exposition import CONTENT_TYPE
from nbdzram.metrics.families import FAMILIES
from nbdzram.metrics.page import load_page
from nbdzram.metrics.process import ProcessMetrics, resident_bytes
from nbdzram.slices import join_in_slices
from nbdzram.status import ClientStatus, ExportSample, HistorySample, ServerStatus, fields, to_json_pieces

REST = 9  # times the making: a tenth of the loop, whoever asks how often
HEALTH = frozenset({"/healthz", "/readyz"})
"""Asked by machines that restart a server which does not answer: they have places of their own, and any name."""

OF_ONE = "/history/"
"""Behind it stands an export's name."""

UNTOLD = frozenset({"allow_addresses", "allow_certificates"})
"""Of an export. Who may attach is the operator's to know, who has the control socket, and not for all to read."""

TEXT, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, and its content."""

    status: HTTPStatus
    kind: str
    body: bytes | bytearray
    headers: Mapping[str, str] = field(default_factory=dict)


def sentence(status: HTTPStatus, text: str) -> Answer:
    """An answer for a person who reads it in a terminal."""
    return Answer(status, TEXT, text.encode() + b"\n")


class Watched(Protocol):
    """What is shown. Nothing here waits."""

    def status(self) -> ServerStatus:
        """Everything, at this moment."""

    def usage_so_far(self) -> tuple[Mapping[str, DiskUsage], float | None]:
        """What each export's blocks cost, by name, and how many seconds ago that was; None: nobody knows yet."""

    def clients(self) -> Sequence[ClientStatus]:
        """Who is attached, at this moment."""

    def history(self) -> Sequence[HistorySample]:
        """The last hours, the oldest first."""

    def history_of(self, name: str) -> Sequence[ExportSample]:
        """The same of one export. Raises NoSuchExport."""


class Answers:
    """By path."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._process = ProcessMetrics()
        self._page, self.policy = load_page()
        self._pace = pace = Pace()
        self._metrics = Shared(pace, self._make_metrics)
        self._status_json = Shared(pace, self._make_status)
        self._usage_json = Shared(pace, self._make_usage)
        self._history_json = Shared(pace, self._make_history)
        self._clients_json = Shared(pace, self._make_clients)
        self._routes: dict[str, Callable[[], Awaitable[Answer]]] = {
            "/": self._show_page,
            "/metrics": self._metrics.get,
            "/healthz": self._say_alive,
            "/readyz": self._say_ready,
            "/status.json": self._status_json.get,
            "/clients.json": self._clients_json.get,
            "/history.json": self._history_json.get,
            "/usage.json": self._usage_json.get,
        }

    async def answer(self, path: str) -> Answer:
        """The answer to a GET."""
        route = self._routes.get(path)
        if route is not None:
            return await route()
        if path.startswith(OF_ONE):
            return await self._show_history_of(unquote(path.removeprefix(OF_ONE)))
        there = ", ".join((*self._routes, f"{OF_ONE}NAME"))
        return sentence(HTTPStatus.NOT_FOUND, f"there is nothing here; there are {there}")

    def hurry(self) -> None:
        """Let nobody wait for a rest any more."""
        self._pace.hurry()

    def stop(self) -> None:
        """End what is being made."""
        made = (self._metrics, self._status_json, self._usage_json, self._history_json, self._clients_json)
        for shared in made:
            shared.stop()

    async def _show_page(self) -> Answer:
        return Answer(HTTPStatus.OK, HTML, self._page)

    async def _show_history_of(self, name: str) -> Answer:
        async def make() -> Answer:
            return await _json(self._watched.history_of(name))

        try:
            return await self._pace.make(make)
        except NoSuchExport:
            return sentence(HTTPStatus.NOT_FOUND, "there is no such export")

    async def _say_alive(self) -> Answer:
        return sentence(HTTPStatus.OK, "ok")

    async def _say_ready(self) -> Answer:
        status = self._watched.status()
        if status.starting or status.draining:
            return sentence(HTTPStatus.SERVICE_UNAVAILABLE, "draining" if status.draining else "starting")
        return sentence(HTTPStatus.OK, "ready")

    async def _make_metrics(self) -> Answer:
        """All families of one moment."""
        status = for_strangers(self._watched.status())
        families = chain.from_iterable(family.lines(status) for family in FAMILIES)
        text = await _in_slices(chain(families, self._process.pieces()))
        return Answer(HTTPStatus.OK, CONTENT_TYPE, text)

    async def _make_status(self) -> Answer:
        status = for_strangers(self._watched.status())
        exports = (_without(fields(export), UNTOLD) for export in status.exports)  # one by one, as they are written
        return await _json(fields(status) | {"exports": exports, "resident_bytes": in_steps(resident_bytes())})

    async def _make_usage(self) -> Answer:
        usage, age_seconds = self._watched.usage_so_far()
        answer = await _json(usage_for_strangers(usage))
        return answer if age_seconds is None else replace(answer, headers={"Age": f"{age_seconds:.0f}"})

    async def _make_clients(self) -> Answer:
        return await _json(self._watched.clients())

    async def _make_history(self) -> Answer:
        return await _json(history_for_strangers(self._watched.history()))


class Pace:
    """One text at a time, and a rest after each."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._due = 0.0
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        """Without rests from now on: soon nobody asks any more."""
        self._hurried.set()

    async def make(self, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """Wait for our turn, then make an answer."""
        async with self._lock:
            await self._rest(self._due - time.monotonic())
            began = time.monotonic()
            try:
                return await make()
            finally:
                ended = time.monotonic()
                self._due = ended + REST * (ended - began)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurried.wait()


class Shared:
    """An answer that is made once for all who ask before it is finished."""

    def __init__(self, pace: Pace, make: Callable[[], Awaitable[Answer]]) -> None:
        self._pace = pace
        self._make = make
        self._making: asyncio.Task[Answer] | None = None

    async def get(self) -> Answer:
        """The next one to be finished."""
        if self._making is None:
            self._making = asyncio.create_task(self._pace.make(self._make))
            self._making.add_done_callback(self._made)
        return await asyncio.shield(self._making)  # who goes away does not end it for the others

    def stop(self) -> None:
        """End it."""
        if self._making is not None:
            self._making.cancel()

    def _made(self, task: asyncio.Task[Answer]) -> None:
        self._making = None
        if not task.cancelled():
            task.exception()  # told to those who wait, if any still do


def _without(record: dict[str, object], names: frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name not in names}


async def _in_slices(pieces: Iterator[str]) -> bytearray:
    await asyncio.sleep(0)  # what is told was looked at in one go
    return await join_in_slices(pieces, partial(asyncio.sleep, 0))


async def _json(value: object) -> Answer:
    return Answer(HTTPStatus.OK, JSON, await _in_slices(to_json_pieces(value)))
