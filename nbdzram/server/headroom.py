"""Memory that is left to this process, and what is done before there is none: writes are refused, memory is given back.

Whoever outgrows its cgroup, or the machine, is ended by the kernel, and disks in memory end with it. So pools may take
what is left and no more, less a reserve, whatever their own limits are.

    free       what the tightest of the cgroups and the machine has left, page cache that can be dropped included
    reserve    what this process may need beside its pools, and others take between two looks
    left       free - reserve: what all pools together may take until the next look
    ceiling    of all pools' sum: what they took before the look, and what is left

    open ──────────> short       short: no pool takes a page more; fold and compact run
      └──< left again <┘

1. However fast writers are, and of however many pools, they are refused at the ceiling and never jump the reserve: the
   engine holds it where pages are taken (engine/purse), whenever the next look is.
2. What pools took is read before what is free: what they take in between counts twice, and never not at all.
3. Reads, trims and removals need no room, and are served as ever.
4. Short ends later than it begins, so that a write more or less does not begin and end it.

The looks are on a thread of their own: to read a cgroup's counters may take the kernel its time, and the event loop may
be late exactly when memory is short.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from nbdzram.engine.pool import Pool
from nbdzram.engine.purse import Purse
from nbdzram.errors import UserError
from nbdzram.machine import MEMINFO, Machine, Room
from nbdzram.server.pools import PoolService
from nbdzram.server.steadily import steadily
from nbdzram.status import HeadroomStatus
from nbdzram.units import format_size

LOOK_SECONDS = 0.25
"""Others take memory too, and give it back. A look reads a handful of files of the kernel."""
RESERVE_SHARE, RESERVE_LEAST, RESERVE_MOST = 32, 16 << 20, 1 << 30
"""Of what the tightest has: for sockets, page tables, and others in the cgroup. What requests may hold comes on top."""
SHORT_SHARE, ENOUGH_SHARE = 8, 2
"""It is short with less left than an eighth of the reserve, and no more with more than a half of it."""
STALLED_PERCENT = 10.0
"""Of the last ten seconds, in which everybody waited for memory at once (PSI, "full"): short, if little is left too."""
RELIEF_SECONDS = 60.0
"""While memory is short: from one fold and compaction of a pool to the next."""

log = logging.getLogger("nbdzram.server")


class Headroom:
    """Looks at what is left, and sets the ceiling. `keep_free` is the reserve; None: as above, 0: nobody looks."""

    def __init__(
        self,
        machine: Machine,
        pools: Callable[[], Sequence[Pool]],
        keep_free: Callable[[], int | None],
        request_bytes: int,
    ) -> None:
        self.status: HeadroomStatus | None = None
        self.purse = Purse()
        self._machine = machine
        self._groups = machine.memory_groups()
        self._pools = pools
        self._keep_free = keep_free
        self._request_bytes = request_bytes
        self._shortages = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look once, and from now on."""
        self.look()
        if self.status is None and self._keep_free() != 0:
            log.warning(
                "how much memory is left is not told here (%s, and no cgroup has a limit): limits.keep_free does "
                "nothing; leave out ProcSubset=pid, or limit the memory of the unit or container",
                MEMINFO,
            )
        self._thread = threading.Thread(target=self._watch, name="headroom", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The ceiling stays as it is."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with steadily("the look at the memory that is left"):
                self.look()

    def look(self) -> None:
        """Set the ceiling by what is left now."""
        keep = self._keep_free()
        if keep == 0:
            self._limit_nothing()
            return
        for pool in self._pools():
            if pool.purse is not self.purse:
                pool.share(self.purse)
        used = self.purse.used  # before what is free: 2.
        rooms = self._machine.rooms(self._groups)
        if not rooms:
            self._limit_nothing()
            return
        room = min(rooms, key=lambda one: one.free - self._reserve(one, keep))
        reserve = self._reserve(room, keep)
        left = room.free - reserve
        was_short = self.status is not None and self.status.short
        short = left < reserve // (ENOUGH_SHARE if was_short else SHORT_SHARE) or (
            left < reserve and self._machine.stalled_percent(self._groups) >= STALLED_PERCENT
        )
        self._shortages += short and not was_short
        self.purse.ceiling = max(used + (0 if short else left), 1)
        self.status = HeadroomStatus(
            whose=str(room.share),
            limit_bytes=room.share.amount,
            free_bytes=max(room.free, 0),
            reserve_bytes=reserve,
            short=short,
            shortages=self._shortages,
        )

    def _limit_nothing(self) -> None:
        self.status, self.purse.ceiling = None, 0

    def _reserve(self, room: Room, keep: int | None) -> int:
        if keep is not None:
            return keep
        share = max(RESERVE_LEAST, min(room.share.amount // RESERVE_SHARE, RESERVE_MOST))
        return share + self._request_bytes


class Relief:
    """What is done when memory is short: it is said, and pools fold and compact. Lives on the event loop."""

    def __init__(self, headroom: Headroom, pools: Mapping[str, PoolService]) -> None:
        self._headroom = headroom
        self._pools = pools
        self._told = False
        self._began: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, now: float) -> None:
        """Called with the loop's clock, once a second."""
        status = self._headroom.status
        short = status is not None and status.short
        if status is not None and short != self._told:
            self._tell(status)
        self._told = short
        if not short:
            self._began.clear()
            return
        for name, service in self._pools.items():
            if now >= self._began.get(name, now - RELIEF_SECONDS) + RELIEF_SECONDS:
                self._began[name] = now
                task = asyncio.create_task(self._give_back(service))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _tell(self, status: HeadroomStatus) -> None:
        left = f"{format_size(status.free_bytes)} of {format_size(status.limit_bytes)} are left to {status.whose}"
        reserve = format_size(status.reserve_bytes)
        if status.short:
            log.warning(
                "memory is short: %s, and %s are kept free (limits.keep_free); writes that need more are refused, and "
                "pools fold and compact; trim on the clients, remove exports, or give it more",
                *(left, reserve),
            )
        else:
            log.info("memory is not short any more: %s, of which %s are kept free", left, reserve)

    async def _give_back(self, service: PoolService) -> None:
        for kind in ("fold", "compact"):
            try:
                await service.maintenance.run(kind, reason="memory_short")
            except UserError as error:
                log.warning("while memory is short: %s", error)
