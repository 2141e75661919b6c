MOST_THREADS: int
"""Threads that may count for one export."""

class Tally:
    """Counters of one export since it was made. Any thread."""

    def total_requests(self) -> int:
        """Requests of all operations."""
    def blocks_trimmed(self) -> int:
        """Blocks that TRIM gave back."""
    def throttled(self) -> tuple[int, int]:
        """(requests that a limit let wait before they began, nanoseconds that they waited)."""
    def operation(self, operation: int) -> tuple[int, int, int, list[int], list[int]] | None:
        """(requests, bytes, nanoseconds, errors by verdict, latency counts by bucket); None: never asked."""
