"""What is kept of streams that were interrupted: the moment of one that was sent, the disks of one that came.

    under way ── breaks ──> kept ── goes on ──> under way ── ...
                             └─ let go

Something is let go when its time is over, when a write finds no room in a pool in which it lies, when there are more
than MOST_KEPT and its time would be over first, when somebody says so, and when the server ends. All of it is concealed
(engine/moment): what a server that was killed had kept is deleted as the next one starts.

Used on the event loop; what takes long is done on a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nbdzram.engine.pool import Pool
from nbdzram.server.steadily import steadily
from nbdzram.status import StreamStatus

KEPT_SECONDS = 3600.0
"""Time for a person to see it, and to mend what was broken."""
SENT_SECONDS = 300.0
"""After a stream that was sent to its end: what is between may still break, and nobody here hears of it."""
MOST_KEPT = 4
"""Each way; whose time is over first makes room. Each keeps memory, and places among a pool's exports."""
LOOK_SECONDS = 1.0

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Kept(Generic[Subject]):
    """`discard` blocks, and leaves nothing of it."""

    identity: bytes
    subject: Subject
    exports: tuple[str, ...]
    pools: Sequence[Pool]
    discard: Callable[[], None]
    records: int
    stream_bytes: int
    token: str | None


class Shelf(Generic[Subject]):
    """Those of one way."""

    def __init__(self, way: str, on_a_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._way = way
        self._on_a_thread = on_a_thread
        self._kept: dict[bytes, tuple[Kept[Subject], float, list[int]]] = {}  # until when, and failed writes by then
        self._watching: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def keep(self, kept: Kept[Subject], seconds: float = KEPT_SECONDS) -> None:
        """From now on, in place of what is kept by this identity: it is what a stream says of itself."""
        await self.let_go(kept.identity)
        self._kept[kept.identity] = kept, asyncio.get_running_loop().time() + seconds, _failed_writes(kept)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        while len(self._kept) > MOST_KEPT:
            await self.let_go(min(self._kept, key=lambda identity: self._kept[identity][1]))

    def take(self, identity: bytes) -> Kept[Subject] | None:
        """It goes on, and is kept no longer; None: nothing is kept of it."""
        kept, _, _ = self._kept.pop(identity, (None, 0.0, []))
        return kept

    def holder_of(self, name: str) -> Kept[Subject] | None:
        """Whatever is kept of an export of this name."""
        return next((kept for kept, _, _ in self._kept.values() if name in kept.exports), None)

    def holder_in(self, pool: Pool) -> Kept[Subject] | None:
        """Whatever lies in this pool."""
        return next((kept for kept, _, _ in self._kept.values() if pool in kept.pools), None)

    async def let_go(self, identity: bytes) -> bool:
        """Nothing stays of it. False: nothing was kept."""
        kept = self.take(identity)
        if kept is None:
            return False
        async with self._turn:  # stop() waits for what is under way
            await self._on_a_thread(kept.discard)
        return True

    async def stop(self) -> None:
        """Nothing stays of any."""
        if self._watching is not None:
            self._watching.cancel()
        for identity in list(self._kept):
            await self.let_go(identity)
        async with self._turn:
            pass

    def status(self) -> list[StreamStatus]:
        """At this moment."""
        now = asyncio.get_running_loop().time()
        return [
            StreamStatus(
                stream=kept.identity.hex(),
                way=self._way,
                state="kept",
                exports=kept.exports,
                records=kept.records,
                stream_bytes=kept.stream_bytes,
                seconds_left=max(until - now, 0.0),
                token=kept.token,
            )
            for kept, until, _ in self._kept.values()
        ]

    async def _watch(self) -> None:
        while self._kept:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for identity, (kept, until, failed) in list(self._kept.items()):
                with steadily("the looks at streams that were interrupted"):
                    if now >= until or _failed_writes(kept) != failed:
                        await asyncio.shield(asyncio.create_task(self.let_go(identity)))


def _failed_writes(kept: Kept[Subject]) -> list[int]:
    return [pool.failed_writes for pool in kept.pools]
