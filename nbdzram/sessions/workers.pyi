from threading import Thread

class Workers:
    """Threads that store parts of large payloads: one fewer than `processors`, as who hands out tasks works too."""

    processors: int
    threads: list[Thread]
    def __init__(self, processors: int) -> None: ...
    def stop(self) -> None:
        """End the threads. No task is under way."""
