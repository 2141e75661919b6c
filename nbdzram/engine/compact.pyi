from nbdzram.engine.pool import Pool
from nbdzram.engine.run import Run

class Compact(Run):
    """One compaction run. report(): objects_moved, pages_returned."""

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
