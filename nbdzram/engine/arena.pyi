BEGUN: bytes
"""What stands where an arena's magic does, until the first pages behind it are written too."""

def unnamed_file(name: str) -> int | None:
    """The descriptor of a new file in memory, for an arena; None: this system has none, or no descriptor is free."""

def holds_nothing(descriptor: int) -> bool:
    """Whether nothing was stored in a file yet: it is empty, or whoever began an arena in it was killed before its end.

    Raises OSError.
    """

def fail_allocation(after: int, /) -> None:
    """Let the allocation after the next `after` ones fail, once; -1: none. For tests of what is left behind."""

def allocations_left() -> int:
    """What is left of fail_allocation's countdown; -1: it has run out, or none was set."""

def refuse_releases(refuse: bool, /) -> None:
    """Let the system refuse every page given back, as it does for locked memory. For tests."""
