from nbdzram.engine.compact import Compact as Compact
from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import FoldReport
from nbdzram.engine.run import Run

class Fold(Run[FoldReport]):
    """One folding run; also for a dry run, which changes nothing."""

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
