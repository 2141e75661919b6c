from dataclasses import dataclass

from typing_extensions import Buffer

@dataclass(frozen=True, slots=True)
class Need:
    """What one way to store the image takes. Bytes; scaled up when only a part of the blocks was looked at."""

    compressed: int  # of all blocks
    distinct: int  # of distinct blocks: what folding leaves
    memory: int  # pages for all blocks: mem_used_total before a fold
    memory_folded: int  # pages for distinct blocks: mem_used_total after fold and compaction

@dataclass(frozen=True, slots=True)
class Figures:
    """An image's numbers so far. Blocks are counts."""

    blocks: int
    same_filled: int
    objects: int  # blocks that need an object
    distinct_objects: int
    needs: dict[str, Need]  # by codec: lz4, zstd (the shorter of both)

class Estimate:
    """What images would need in a pool, without storing them.

    Every block is hashed; those whose hash falls on one of `sample` (1: all) are compressed. So the sample has every
    copy of a block or none, and what is said of folding stays true. Memory: 16 bytes a distinct sampled block.
    """

    def __init__(self, *, level: int = 3, sample: int = 1) -> None: ...
    def feed(self, content: Buffer) -> None:
        """Blocks, whole but for an image's last. Without the interpreter lock."""
    def figures(self) -> Figures:
        """Raises UserError: none of the blocks is in the sample."""
