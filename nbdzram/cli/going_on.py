"""What systemd is told while a start or a stop goes on, so that it cuts none that does: it knows seconds alone.

TimeoutStartSec= and TimeoutStopSec= of the unit are for what hangs. A stop that writes a last checkpoint of hundreds of
GiB takes minutes, and so does a start from one: each step by which they come on has its time anew. It is never less
than what the unit allows (EXTEND_TIMEOUT_USEC=, sd_notify(3)).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from nbdzram.cli.supervisor import notify_supervisor
from nbdzram.units import format_size

if TYPE_CHECKING:
    from nbdzram.server.service import Service

LOOK_SECONDS = 1.0
STEP_SECONDS = 60.0
"""What a step may take, as TimeoutStopSec= of the unit: a thousandth of a checkpoint on a slow disk, say."""
STEP_SECONDS_A_GIB = 0.5
"""... and for each GiB that is stored: the last step gives it back, in a process that can say nothing more."""
GIB = 1 << 30


@contextlib.asynccontextmanager
async def told_as_it_starts(service: Service) -> AsyncIterator[None]:
    """A start that fills its pools from checkpoints or a stream goes on while there is more and more in them."""
    async with _told(lambda: f"starting: {format_size(_stored_bytes(service))} stored", service):
        yield


@contextlib.asynccontextmanager
async def told_as_it_stops(service: Service) -> AsyncIterator[None]:
    """A stop goes on while it writes its last checkpoint; its end is the process's, which gives all memory back."""
    notify_supervisor("STOPPING=1")
    stored_bytes = _stored_bytes(service)
    _extend("stopping", stored_bytes, service.config.limits.drain_seconds)
    async with _told(lambda: _last_checkpoint(service), service):
        yield
    _extend("giving memory back", stored_bytes)


@contextlib.asynccontextmanager
async def _told(far: Callable[[], str], service: Service) -> AsyncIterator[None]:
    """In here each change of how `far` it is is told; at its end that is no more."""
    before = told = far()

    async def watch() -> None:
        nonlocal told
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = far()
            if now != told:
                told = now
                _extend(told, _stored_bytes(service))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        if told != before:
            notify_supervisor("STATUS=")


def _extend(says: str, stored_bytes: int, besides_seconds: float = 0.0) -> None:
    seconds = STEP_SECONDS + STEP_SECONDS_A_GIB * stored_bytes / GIB + besides_seconds
    notify_supervisor(f"STATUS={says}\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def _stored_bytes(service: Service) -> int:
    return sum(pool.stats.mem_used_total for pool in service.status().pools)


def _last_checkpoint(service: Service) -> str:
    share = service.checkpoint.written_share if service.checkpoint is not None else None
    return "stopping" if share is None else f"writing the last checkpoint: {share:.1%}"
