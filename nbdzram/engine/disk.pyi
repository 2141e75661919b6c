from enum import IntFlag

from typing_extensions import Buffer

from nbdzram.engine.pool import Pool
from nbdzram.engine.stats import DiskStats, DiskUsage

class Extent(IntFlag):
    """What a run of blocks is. HOLE and ZERO are the bits of NBD's base:allocation; the others are ours."""

    HOLE = 1
    ZERO = 2
    SHARED = 4
    HUGE = 8
    SAME_FILLED = 16

class Disk:
    """An export: a block table in a pool. Made by Pool.create and Pool.clone, never directly.

    Offsets and lengths are bytes, of any alignment; the caller has checked that they lie inside the export
    (ValueError otherwise). A request larger than OFFLOAD_SIZE gives the interpreter lock away while it runs.
    Once the disk was deleted, or its pool closed, everything but its counters raises EngineError.
    """

    @property
    def name(self) -> str: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def read_only(self) -> bool:
        """A mark for the server; the engine does not enforce it."""
    @property
    def private(self) -> bool:
        """Its blocks share objects with its own and its clones' alone (domain.pxd)."""
    @property
    def domain(self) -> int:
        """Of folding: with whose blocks its own may share objects; 0: with those of all that are not private."""
    @property
    def damaged(self) -> bool:
        """Its entry in the export directory is not what was written: it can be read, written and copied, and is not
        changed otherwise; opening refuses the arena."""
    @property
    def identity(self) -> int:
        """48 bits that every copy of its content has, here and elsewhere, and no other content; 0: none."""
    quota_bytes: int
    """Of blocks that are stored, same-filled included; 0: as many as the pool has room for. In whole blocks."""
    def identify(self, identity: int) -> None:
        """Give a disk that will not change an identity, or take it away (0) before it changes."""
    @property
    def concealed(self) -> bool:
        """It is not offered (moment.pyi)."""
    @property
    def number(self) -> int:
        """Its place in the pool's export directory."""
    def read(self, offset: int, length: int) -> bytes: ...
    def read_into(self, offset: int, target: Buffer) -> None:
        """Fill the writable, contiguous `target` from `offset`."""
    def write(self, offset: int, source: Buffer) -> None:
        """Store. Raises PoolFull, also for a quota: each block then has its old or its new content, none a mixture."""
    def trim(self, offset: int, length: int) -> None:
        """Whole blocks in the range become holes and read as zeroes; partial blocks at its ends stay as they are."""
    def first_unreadable(self, handle: int) -> int | None:
        """The first block of which nobody knows what it is, or whose object is that of `handle` (0: none is)."""
    def clear(self) -> None:
        """All blocks become holes, a last one that is none whole too, as long as nobody writes or resizes meanwhile.

        Raises PoolFull: there was no room to let go of what a clone shares, and that is still there.
        """
    def zero(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """The range reads as zeroes. no_hole: its blocks count as stored (same-filled), not holes. Raises PoolFull."""
    def extents(self, offset: int, length: int, limit: int, mask: int = 31) -> list[tuple[int, int]]:
        """Coalesced (length in bytes, Extent bits), in order from `offset`, at most `limit` of them.

        Bits outside `mask` are neither told nor kept apart. SHARED is told of blocks whose object another block of the
        export holds, within the same 256 MiB of it; where the pool tells sharing, of all that have other holders.

        They cover exactly `length` bytes, or less when `limit` was reached.
        """
    def resize(self, size_bytes: int) -> None:
        """Shrinking frees what lies behind the new end, and never for want of memory fails. May take long.

        Growing shows zeroes. Raises PoolFull where an earlier shrink could not clear what it left and there is still no
        memory for that; UserError for a size beyond the largest, and while another thread resizes.
        """
    def stats(self) -> DiskStats: ...
    def usage(self) -> DiskUsage: ...

OFFLOAD_SIZE: int

def offload_from(size: int, /) -> None:
    """Let requests over `size` bytes give the interpreter lock away; OFFLOAD_SIZE by default. For tests of threads."""
