from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from nbdzram.engine.disk import Disk
from nbdzram.engine.purse import Purse
from nbdzram.engine.stats import PoolStats

HUGE_THRESHOLD: int
"""Compressed sizes from here on are stored raw, bytes (zsmalloc's rule)."""

ARENA_FORMAT: int
"""In which arenas are written."""

class Pool:
    """One memory limit, one folding domain. Safe to use from several threads at once.

    path: a file (tmpfs or disk) that outlives the process and is opened again with everything in it. memory: the
    descriptor of a file without a name (arena.unnamed_file), which does as long as somebody has it; the caller keeps
    it. Neither: the arena is anonymous memory. together: runs functions of an opening, which let go of the interpreter
    lock, several at the same time, and returns when all have ended; by default it runs them in turn. Raises ArenaError.
    """

    def __init__(
        self,
        *,
        mem_limit: int = 0,
        path: str | None = None,
        memory: int | None = None,
        inline_dedup: bool = False,
        verify: bool = True,
        tell_sharing: bool = False,
        clock: int = 0,
        fingerprint_mask: int = 0xFFFFFFFFFFFFFFFF,
        together: Callable[[Sequence[Callable[[], None]]], None] = ...,
    ) -> None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def is_private(self) -> bool:
        """Whether its arena is anonymous memory, which no other process can open. Until it is closed."""
    @property
    def mem_limit(self) -> int:
        """Bytes of zspages and metadata (PoolStats.memory_used); 0 is no limit. What is stored stays.

        May be set at any time, as in zram, up to half of the addresses reserved on opening (UserError).
        """
    @mem_limit.setter
    def mem_limit(self, limit: int) -> None: ...
    def share(self, purse: Purse | None) -> None:
        """Take from this purse too, beside the pool's own limit; from none when it is closed."""
    @property
    def purse(self) -> Purse | None:
        """What it takes from too."""
    def require_limit(self, limit: int) -> None:
        """Whether mem_limit may be set so. Raises UserError."""
    @property
    def inline_dedup(self) -> bool:
        """A write whose content is already stored is folded before it is compressed."""
    @inline_dedup.setter
    def inline_dedup(self, on: bool) -> None: ...
    tells_sharing: bool
    """Whether Disk.extents tells SHARED of blocks whose objects other exports hold too."""
    @property
    def verify(self) -> bool:
        """What is read is held against its fingerprint; what does not match is an error of that block alone."""
    @verify.setter
    def verify(self, on: bool) -> None: ...
    def set_clock(self, seconds: int) -> None:
        """Tell the engine the time: it has no clock of its own. For idle tracking.

        Seconds of a clock that goes on while the machine is off, since ages stand in the arena.
        """
    def last_rot(self) -> str | None:
        """The block that was last found not to be what was written; PoolStats.blocks_rotten counts them."""
    def stats(self) -> PoolStats:
        """All of its counters at one moment. It takes back first what threads have at hand: not for each request."""
    @property
    def failed_writes(self) -> int:
        """That counter alone: one load, for who looks often whether a write found no room."""
    def declined(self) -> tuple[int, int]:
        """How often, ever, there was a page for it within its limit, but none in the purse, and none in its file
        system."""
    def lacks(self) -> str:
        """What its file lacks where it could not become larger the last time, and what to do: a part of a sentence."""
    def turns(self) -> int:
        """How often others than runs have had the pool's lock: whether clients come."""
    def turns_behind(self) -> int:
        """How often runs, and deletions, have had the pool's lock, behind clients."""
    def readers_looked_again(self) -> tuple[int, int]:
        """For tests: blocks that were read again under the lock as they had changed or were not right, and as the bytes
        that were found were not the object's: rot, or a mistake of ours.
        """
    def reset_mem_used_max(self) -> None: ...
    def disks(self) -> list[Disk]:
        """The exports."""
    def all_disks(self) -> list[Disk]:
        """Those, and the concealed ones (moment.pyi)."""
    def create(self, name: str, size_bytes: int, *, read_only: bool = False, private: bool = False) -> Disk:
        """A new, empty export of the pool. Raises ExportExists, UserError (bad size or name, directory full)."""
    def clone(self, source: Disk, name: str, *, read_only: bool = False) -> Disk:
        """A new export with the content that `source` has now; nothing is stored again. Microseconds, any size.

        Raises EngineError when `source` is gone, and as create does.
        """
    def rename(self, disk: Disk, name: str) -> None:
        """Give an export another name; whoever reads and writes it goes on. Whole, or not there after a kill.

        Raises ExportExists, EngineError when it is gone, UserError where both names have over 256 bytes together, and a
        short one in between helps.
        """
    def delete(self, disk: Disk) -> None:
        """Forget an export and free what nobody else holds. May take long: call it off the event loop.

        Raises EngineError when it is gone.
        """
    def check(self) -> None:
        """Hold every invariant that check.pyx names against a recount. Raises CheckFailed."""
    def close(self) -> None:
        """End the pool's use. Waits until nobody is in it; who takes long (a deletion, a trim) stops where it is, and
        the next opening finishes what was begun. Then its disks refuse requests, and a file may be opened again.
        """
    def test_locks(self, *, watch: bool = False, pause: bool = False, linger: str = "") -> None:
        """For tests. watch: measure every hold of the pool's lock and the disks' stripes from now on. pause: let
        threads step aside at random before they take a lock and after they leave one. linger: keep who left the pool's
        lock in a function whose name ends so, or a reader at the place of that name (engine/reading.pyx), until they
        are tested otherwise.
        """
    def taken_alone(self) -> tuple[int, int]:
        """How often the pool's lock was taken with everybody else shut out; how often somebody waited. Runs aside.

        For tests and measurements: writes share it (engine/beside.pyx).
        """

    def lingering(self) -> int:
        """How many threads linger."""
    def most_in_a_hold(self) -> tuple[int, int]:
        """The most entries that walks might look at in a hold, and words of nodes that they passed over."""
    def buckets(self) -> int:
        """Of the index, as it is just now. For tests: a start, or a look at the counters, makes it fit."""
    def longest_holds(self) -> dict[str, tuple[int, str]]:
        """Of each kind of lock, the longest hold since test_locks: nanoseconds of processor time, and where."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
