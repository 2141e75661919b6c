from collections.abc import Sequence

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
    def add(
        self, operation: int, requests: int, size: int, nanoseconds: int, errors: Sequence[int], latency: Sequence[int]
    ) -> None:
        """To what `operation` tells. Only while no thread counts: each has its own counters, and these are one's."""
    def add_trimmed(self, blocks: int) -> None:
        """To what `blocks_trimmed` tells, under the same rule."""
    def add_throttled(self, requests: int, nanoseconds: int) -> None:
        """To what `throttled` tells, under the same rule."""
    def operation(self, operation: int) -> tuple[int, int, int, list[int], list[int]] | None:
        """(requests, bytes, nanoseconds, errors by verdict, latency counts by bucket); None: never asked."""
