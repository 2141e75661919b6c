def stay_online(on: bool, /) -> None:
    """Let the calling thread be online, or no more, as if it were reading. For tests: what it could see is kept.

    A thread that is online must not wait for one that waits for a grace period: both would wait for ever.
    """

def refuse_watches(refuse: bool, /) -> None:
    """Have no memory to watch another thread, which reads and writes by the locks then. For tests."""

def watches() -> int:
    """Threads that are watched, or were, and whose place waits for another. For tests."""

def waiting() -> int:
    """Threads that wait for a grace period at this moment. For tests."""

def grace_periods() -> int:
    """That began so far, of all pools. For tests and measurements: each has all who write or read told something."""
