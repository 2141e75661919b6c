from nbdzram.server.counts import IoStat
from nbdzram.status import OperationStatus

class Traffic:
    """Counters of one export since it was made."""

    def total_requests(self) -> int:
        """Requests of all operations."""
    def operations(self) -> dict[str, OperationStatus]:
        """Counts by operation name (read, write...; other: commands that do not exist)."""
    def io_stat(self) -> IoStat:
        """The four fields of zram's io_stat."""
