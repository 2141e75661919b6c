def keep_memory() -> None:
    """Reuse freed buffers up to a limit, instead of giving each back to the system at once."""

def release_memory() -> None:
    """Give freed buffers back to the system: the C library keeps them otherwise."""

class Budget:
    """Bytes that payloads and replies under way may hold, over all clients. Any thread."""

    limit: int
    def __init__(self, limit: int) -> None: ...
    @property
    def used(self) -> int:
        """Bytes that are held now."""
