"""The last hours of a server, kept by it, so that a page that is opened now shows what was.

A sample each SAMPLE_SECONDS, KEPT of them: two hours in some hundred kilobytes, however many exports. It is made from
what each export did since the last one, so that one that was removed or made anew disturbs nothing. Making it is a walk
over the exports in slices, between which clients are served. What single exports did is chronicle.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from nbdzram.rates import Rates, rates_of
from nbdzram.server.chronicle import Chronicle
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS
from nbdzram.server.exports import Export, Exports
from nbdzram.server.steadily import steadily
from nbdzram.slices import walk_in_slices
from nbdzram.status import ExportSample, HistorySample, OperationStatus

SAMPLE_SECONDS = 10.0
KEPT = 720
CLOCK_STEP_SECONDS = 1.0  # by more it was set, and did not drift

_Operations = Mapping[str, OperationStatus]


def began(told: float, uptime_seconds: float) -> float:
    """When a server that was `told` to have begun then did, by the clock as it is now. A machine begins with a wrong
    one, or sleeps; how old everything is is counted from here."""
    by_now = time.time() - uptime_seconds
    return by_now if abs(by_now - told) > CLOCK_STEP_SECONDS else told


class History:
    """Lives on the event loop: start, ..., stop."""

    def __init__(
        self,
        exports: Exports,
        memory_bytes: Callable[[], int],
        state_dir: Path | None,
        before: Iterable[HistorySample] = (),
    ) -> None:
        """`before`: what the process had that goes on in this one."""
        self.samples: deque[HistorySample] = deque(before, maxlen=KEPT)
        self._chronicle = Chronicle(KEPT)
        self.state_dir_size_bytes = 0
        self.state_dir_free_bytes = 0
        self._exports = exports
        self._memory_bytes = memory_bytes
        self._state_dir = state_dir
        self._before: dict[Export, _Operations] = {}
        self._sampling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sample from now on."""
        self._sampling = asyncio.create_task(self._sample_for_ever())

    def stop(self) -> None:
        """Sample no more."""
        if self._sampling is not None:
            self._sampling.cancel()

    def of(self, export: Export) -> tuple[ExportSample, ...]:
        """The last hours of one export, the oldest first; none of what another process had before a takeover."""
        return tuple(self._chronicle.of(export, [sample.at for sample in self.samples]))

    async def sample(self, seconds: float) -> None:
        """What happened in the `seconds` since the last one."""
        pairs: list[tuple[_Operations, _Operations]] = []
        now: dict[Export, _Operations] = {}
        busy: dict[Export, Rates] = {}

        def look() -> Iterator[None]:
            for export in tuple(self._exports):
                now[export] = export.traffic.operations()
                if export in self._before:
                    pair = self._before[export], now[export]
                    pairs.append(pair)
                    if _requests(pair[0]) != _requests(pair[1]):
                        busy[export] = rates_of([pair], seconds, LATENCY_BOUNDS_SECONDS)
                yield

        await walk_in_slices(look(), partial(asyncio.sleep, 0))
        rates = rates_of(pairs, seconds, LATENCY_BOUNDS_SECONDS) if self._before else Rates()
        self._before = now
        self._chronicle.add(busy, now)
        at = time.time()
        self._set_back(at - seconds)
        self.samples.append(
            HistorySample(
                at=at,
                read_bytes=rates.read_bytes,
                write_bytes=rates.write_bytes,
                requests=rates.requests,
                median_seconds=rates.median_seconds,
                p99_seconds=rates.p99_seconds,
                memory_bytes=self._memory_bytes(),
            )
        )

    def _set_back(self, last: float) -> None:
        """Where the clock was set back, so is what was before: the last sample was at `last`, and none is to come."""
        ahead = self.samples[-1].at - last if self.samples else 0.0
        if ahead > SAMPLE_SECONDS:
            for index, sample in enumerate(self.samples):
                self.samples[index] = replace(sample, at=sample.at - ahead)

    async def _sample_for_ever(self) -> None:
        loop, last = asyncio.get_running_loop(), 0.0
        while True:
            if self._state_dir is not None:  # a file system of a network may take its time
                with contextlib.suppress(OSError):
                    room = await asyncio.to_thread(shutil.disk_usage, self._state_dir)
                    self.state_dir_size_bytes, self.state_dir_free_bytes = room.total, room.free
            now = loop.time()
            with steadily("the history"):
                await self.sample(max(now - last, 1e-3))
            last = now
            await asyncio.sleep(SAMPLE_SECONDS)


def _requests(operations: _Operations) -> int:
    return sum(one.requests for one in operations.values())
