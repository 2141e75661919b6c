from nbdzram.engine.compact import Compact as Compact
from nbdzram.engine.pool import Pool
from nbdzram.engine.run import Run

class Fold(Run):
    """One folding run; also for a dry run, which changes nothing.

    report(): objects_merged, bytes_freed (compressed), pages_returned, comparisons.
    """

    def __init__(self, pool: Pool, *, dry_run: bool = False) -> None: ...
