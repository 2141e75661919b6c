from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import CompactReport
from nbdzram.engine.run import Run

class Compact(Run[CompactReport]):
    """One compaction run."""

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
