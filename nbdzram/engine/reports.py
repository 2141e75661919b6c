"""What comes of a run, a record a kind. Fields are counts where their names do not say bytes or pages.

They stand in what the server tells as they are named here, in this order (status/runs.py, `result`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.engine.stats import PAGE_SIZE


class MemoryReport:
    """Of a run that is for memory."""

    __slots__ = ()
    pages_returned: int

    @property
    def bytes_returned(self) -> int:
        """Of memory, to the system."""
        return self.pages_returned * PAGE_SIZE

    @property
    def bytes_gained(self) -> int:
        """Of memory returned, or of objects that others can take."""
        return self.bytes_returned


@dataclass(frozen=True, slots=True)
class FoldReport(MemoryReport):
    """Of a fold, or of what one would do (a dry run)."""

    objects_merged: int
    bytes_freed: int  # compressed bytes of the objects that are no more
    pages_returned: int
    comparisons: int  # of contents, byte by byte

    @property
    def bytes_gained(self) -> int:
        """Of memory returned, or of objects that others can take."""
        return max(self.bytes_freed, self.bytes_returned)


@dataclass(frozen=True, slots=True)
class CompactReport(MemoryReport):
    """Of a compaction, or of what one would do (a dry run)."""

    objects_moved: int
    pages_returned: int


@dataclass(frozen=True, slots=True)
class RecompressReport(MemoryReport):
    """Of a recompression."""

    objects_seen: int  # and encoded again
    objects_recompressed: int  # and kept so, as they became smaller
    bytes_before: int  # of those
    bytes_after: int
    pages_returned: int
    dictionary_bytes: int  # of the dictionary that was used; 0: none

    @property
    def bytes_gained(self) -> int:
        """Of memory returned, or of objects that others can take."""
        return max(self.bytes_before - self.bytes_after, self.bytes_returned)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Of a check that found nothing wrong."""

    objects_checked: int
    changing: int  # cells, nodes and zspages that clients changed during the recount, and that were passed over


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """Of a look for rot, as far as it came."""

    objects_checked: int
    objects_rotten: int
    blocks_checked: int
    blocks_rotten: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Of a scrub and a recount, one after the other."""

    objects_checked: int
    changing: int
    objects_rotten: int
    blocks_checked: int
    blocks_rotten: int


Report = FoldReport | CompactReport | RecompressReport | CheckReport | ScrubReport | VerifyReport
