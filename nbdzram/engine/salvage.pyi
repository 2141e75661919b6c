from collections.abc import Iterator

HOLE: int
WORD: int
OBJECT: int
MISSING: int
"""What an entry is."""

class Salvage:
    """An arena's file, read as far as it is right. Nothing of it is changed. Raises ArenaError: nothing can be read."""

    def __init__(self, path: str) -> None: ...
    def exports(self) -> tuple[list[tuple[int, str, int, bool, int]], int]:
        """Number, name, size in bytes, read-only, folding domain of each; and how many have entries that are wrong."""
    def leaves(self, number: int) -> Iterator[tuple[int, int, list[tuple[int, int]] | None]]:
        """An export's leaves: first block, count of blocks, and of each what it is (HOLE, MISSING, a WORD that it
        repeats, the handle of an OBJECT); None: none of these blocks is known. What is in no leaf is a hole.
        """
    def content(self, handle: int) -> bytes | None:
        """The block of an object; None: it is not what was written."""
