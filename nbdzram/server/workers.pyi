def keep_memory() -> None:
    """Reuse freed buffers up to a limit, instead of giving each back to the system at once."""

def release_memory() -> None:
    """Give freed buffers back to the system: the C library keeps them otherwise."""

class Budget:
    """Bytes that payloads and replies under way may hold, over all connections. Loop's thread only."""

    limit: int
    used: int
    def __init__(self, limit: int) -> None: ...

class Workers:
    """`count` threads, and the loop's thread calls `collect` whenever `fileno` is readable."""

    def __init__(self, count: int) -> None: ...
    def fileno(self) -> int:
        """Readable when collect has something to do."""
    def collect(self) -> None:
        """Hand finished tasks to their operations. Loop's thread only."""
    def stop(self) -> None:
        """End the threads. The caller has collected every task."""
