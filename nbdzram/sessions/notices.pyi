class Notices:
    """What threads have to say for the log: a bounded ring."""

    dropped: int
    """Notices that were lost, as nobody read in time."""
