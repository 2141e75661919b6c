from nbdzram.engine.pool import Pool

class Fold:
    """One folding run, in bounded steps, without the interpreter lock. Also for a dry run, which changes nothing.

    Call step() from a thread of its own until it returns False; clients go on meanwhile.
    """

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
    def step(self, budget: int = 4096) -> bool:
        """Look at up to `budget` objects. True while there is more."""
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    def report(self) -> dict[str, int]:
        """objects_merged, bytes_freed (compressed), pages_returned, comparisons."""

class Compact:
    """One compaction run: the same shape. report(): objects_moved, pages_returned."""

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
    def step(self, budget: int = 4096) -> bool: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    def report(self) -> dict[str, int]: ...
