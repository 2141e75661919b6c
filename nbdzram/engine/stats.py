"""What the engine counts: plain frozen records, read under one lock, consistent in themselves.

The first ten fields of PoolStats are zram's mm_stat line (Documentation/admin-guide/blockdev/zram), in its order,
with pages_folded as the tenth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

PAGE_SIZE = 4096
BLOCK_SIZE = 4096

CUMULATIVE = (
    "pages_compacted",
    "huge_pages_since",
    "pages_folded",
    "objects_folded",
    "inline_folded",
    "objects_moved",
    "objects_recompressed",
    "failed_writes",
    "blocks_rotten",
)
"""What of PoolStats only grows, from the moment that the pool was opened."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool's counters. Sizes are bytes, the rest are counts."""

    orig_data_size: int  # bytes of blocks stored, same-filled included
    compr_data_size: int  # bytes of distinct stored objects
    mem_used_total: int  # bytes of the pages in zspages, fragmentation included, metadata not: zram counts no more
    mem_limit: int  # bytes that mem_used_total and metadata may take together; 0 is no limit
    mem_used_max: int  # highest mem_used_total so far
    same_pages: int  # blocks stored as one repeated word
    pages_compacted: int  # cumulative: pages that compaction returned
    huge_pages: int  # objects stored raw now
    huge_pages_since: int  # cumulative: objects ever stored raw
    pages_folded: int  # cumulative: pages that folding returned

    metadata: int  # bytes of tables, handle cells, indexes, zspage descriptors, dictionaries: every other page
    objects: int  # distinct objects
    handles: int  # live handles (an object shared by folding has several)
    shared_objects: int  # objects that more than one block table entry or handle points at
    shared_bytes: int  # what shared objects save: sum of (sharers - 1) * length; tables that clones share save more
    fold_pending: int  # objects whose fingerprint was already present: what the next fold will look at
    objects_folded: int  # cumulative: objects that folding or inline deduplication merged away
    inline_folded: int  # cumulative: writes that found their content already stored
    objects_moved: int  # cumulative: objects that compaction moved
    objects_recompressed: int  # cumulative
    recompress_untried: int  # bytes of LZ4 objects that no recompression has tried yet, at the strength of the last one
    compr_by_codec: dict[str, int]  # bytes of distinct objects, by codec name: raw, lz4, zstd, zstd-dict
    zspages: int
    failed_writes: int  # cumulative: writes refused with PoolFull
    blocks_rotten: int  # cumulative: times that a block was found not to be what was written

    @property
    def memory_used(self) -> int:
        """Bytes that the pool takes in all: what mem_limit bounds."""
        return self.mem_used_total + self.metadata

    @property
    def saved(self) -> int:
        """Bytes that the pool spares its host: what is stored, less the memory for it, metadata included.

        The one meaning of "saved", in columns, JSON, metrics and on every page.
        """
        return self.orig_data_size - self.mem_used_total - self.metadata

    def counters(self) -> dict[str, int]:
        """What another process goes on from that opens the pool."""
        return {name: getattr(self, name) for name in (*CUMULATIVE, "mem_used_max")}

    def gone_on(self, before: Mapping[str, int]) -> PoolStats:
        """The same of a pool that has counted so much before it was opened."""
        if not before:
            return self
        sums = {name: getattr(self, name) + before.get(name, 0) for name in CUMULATIVE}
        highest = max(self.mem_used_max, before.get("mem_used_max", 0))
        return dataclasses.replace(self, mem_used_max=highest, **sums)

    def mm_stat(self) -> tuple[int, ...]:
        """The ten numbers of zram's mm_stat line, in order."""
        return (
            self.orig_data_size,
            self.compr_data_size,
            self.mem_used_total,
            self.mem_limit,
            self.mem_used_max,
            self.same_pages,
            self.pages_compacted,
            self.huge_pages,
            self.huge_pages_since,
            self.pages_folded,
        )


class DiskStats(NamedTuple):
    """One export's share. Sizes are bytes. Made in a twentieth of a dataclass's time, which commands would pay for."""

    size: int
    stored: int  # bytes of its blocks that are stored (same-filled included); the rest are holes
    same_filled: int  # bytes of its blocks that are same-filled


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What an export's blocks cost, from a walk over its block table (a walk takes about 15 ms a GiB)."""

    stored: int  # bytes of blocks stored
    same_filled: int  # bytes of same-filled blocks
    compressed: int  # compressed bytes that its blocks point at, an object counted once a block
    unique: int  # compressed bytes of objects that it alone holds, each counted once: what removing it would free
    shared: int  # compressed - unique: held by others too, or counted again as several of its blocks hold it
    huge: int  # bytes of blocks stored raw
