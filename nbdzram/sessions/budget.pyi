def keep_memory() -> None:
    """Use the memory of Python's buffers again; a larger one than they have goes back when it is freed."""

def release_memory() -> None:
    """Give freed buffers back to the system: the C library keeps small ones otherwise."""

class Budget:
    """Bytes that payloads and replies under way may hold, over all clients. Any thread."""

    limit: int
    def __init__(self, limit: int) -> None: ...
    @property
    def used(self) -> int:
        """Bytes that are held now."""
    @property
    def kept(self) -> int:
        """Bytes of large buffers that nobody has."""
    def rest(self) -> None:
        """Called now and then: keep nothing when nothing of it was taken since the last call."""
    def empty(self) -> None:
        """Keep nothing."""
