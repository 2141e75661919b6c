def kill_at_publish(moment: int, /) -> None:
    """Kill this process at a moment of a later publication; 0: never. For tests of what a kill leaves behind.

    Moments count from 1, two a publication: odd ones come right before its store, even ones right behind it.
    """

def pause_at_publish(on: bool, /) -> None:
    """Let threads step aside at random at publications, in the middle of a change. For tests."""

def moments_left() -> int:
    """What is left of the countdown; 0: it has run out, or none was set."""
