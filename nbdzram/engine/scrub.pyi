from collections.abc import Sequence

from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import ScrubReport
from nbdzram.engine.run import Run

class Scrub(Run[ScrubReport]):
    """One look at every object and every block; nothing is changed, and it goes on behind what it finds."""

    def __init__(self, pool: Pool) -> None: ...
    @property
    def objects(self) -> int:
        """Decoded so far."""
    @property
    def objects_rotten(self) -> int: ...
    @property
    def blocks(self) -> int:
        """Looked at so far."""
    @property
    def blocks_rotten(self) -> int: ...
    @property
    def places(self) -> Sequence[tuple[str, int]]:
        """Export and number of the first blocks that cannot be read."""
    @property
    def finished(self) -> bool: ...
