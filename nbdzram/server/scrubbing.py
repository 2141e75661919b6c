"""Looking for rot by itself and when asked: what was looked at, what was found, and who is told.

A scrub (engine/scrub) names every block that cannot be read. By itself it goes at a pace of its own, and at full speed
while another run of the pool waits for its end. A check is a scrub, and then the recount (engine/check).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nbdzram.engine.check import Check
from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import VerifyReport
from nbdzram.engine.scrub import Scrub
from nbdzram.errors import CheckFailed
from nbdzram.status import ScrubStatus

NAMED_RANGES = 20
"""Of blocks, in one sentence; what is beyond is counted."""

log = logging.getLogger("nbdzram.server")


class Scrubs:
    """Those of one pool."""

    def __init__(self, pool_name: str, pool: Pool, *, objects: int = 0, blocks: int = 0) -> None:
        """`objects`, `blocks`: that another process has looked at before."""
        self._pool_name = pool_name
        self._pool = pool
        self._objects, self._blocks = objects, blocks  # of those that ended, or were ended
        self._last: Scrub | None = None
        self._told = True
        self._found = (0, 0)  # rotten objects and blocks, by the last that was finished
        self._finished_at: float | None = None

    def begin(self) -> Scrub:
        """Another one."""
        if self._last is not None:
            self._objects += self._last.objects
            self._blocks += self._last.blocks
        self._last, self._told = Scrub(self._pool), False
        return self._last

    def begin_check(self) -> Checking:
        """A scrub, and the recount."""
        return Checking(self._pool, self.begin())

    def status(self) -> ScrubStatus:
        """So far."""
        now = self._last
        return ScrubStatus(
            objects=self._objects + (now.objects if now is not None else 0),
            blocks=self._blocks + (now.blocks if now is not None else 0),
            rotten_objects=self._found[0],
            rotten_blocks=self._found[1],
            finished_at=self._finished_at,
        )

    def tell(self, wall_clock: float) -> None:
        """Log what the last one found, once, when it is finished."""
        last = self._last
        if last is None or self._told or not last.finished:
            return
        self._told, self._found, self._finished_at = True, (last.objects_rotten, last.blocks_rotten), wall_clock
        if last.blocks_rotten:
            log.error(
                "the pool %s holds %s not what was written: %s; reading one is an error, writing it "
                "mends it; memory may be failing",
                *(self._pool_name, _so_many(last.blocks_rotten), ranges_of(last.places, last.blocks_rotten)),
            )


def _so_many(blocks: int) -> str:
    return "1 block that is" if blocks == 1 else f"{blocks} blocks that are"


class Checking:
    """A scrub and a recount as one run. Fails with the blocks that cannot be read, and what else does not hold."""

    def __init__(self, pool: Pool, scrub: Scrub) -> None:
        self._scrub = scrub
        self._recount = Check(pool, contents=False)

    def step(self, budget: int = 4096) -> bool:
        """Raises CheckFailed."""
        if not self._scrub.finished:
            self._scrub.step(budget)
            return True
        try:
            if self._recount.step(budget):
                return True
        except CheckFailed as error:
            if self._scrub.blocks_rotten:
                raise CheckFailed(f"{self._rot()}; and {error}") from error
            raise
        if self._scrub.blocks_rotten:
            raise CheckFailed(self._rot())
        return False

    @property
    def done(self) -> int:
        """Work done."""
        return self._scrub.done + self._recount.done

    @property
    def total(self) -> int:
        """Work to do."""
        return self._scrub.total + self._recount.total

    def report(self) -> VerifyReport:
        """What came of it."""
        looked = self._scrub.report()
        return VerifyReport(
            objects_checked=looked.objects_checked,
            changing=self._recount.report().changing,
            objects_rotten=looked.objects_rotten,
            blocks_checked=looked.blocks_checked,
            blocks_rotten=looked.blocks_rotten,
        )

    def _rot(self) -> str:
        found = self._scrub
        return f"not what was written: {ranges_of(found.places, found.blocks_rotten)}"


def ranges_of(places: Sequence[tuple[str, int]], count: int) -> str:
    """Blocks and their exports in words: block 7 of export 'a', blocks 8 to 9 of export 'b'."""
    ranges: list[tuple[str, int, int]] = []
    for name, block in places:
        if ranges and ranges[-1][0] == name and ranges[-1][2] + 1 == block:
            ranges[-1] = (name, ranges[-1][1], block)
        else:
            ranges.append((name, block, block))
    shown = ranges[:NAMED_RANGES]
    words = [
        f"block {first} of export {name!r}" if first == last else f"blocks {first} to {last} of export {name!r}"
        for name, first, last in shown
    ]
    more = count - sum(last - first + 1 for _, first, last in shown)
    return ", ".join(words) + (f" and {more} more" if more else "")
