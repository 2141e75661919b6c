class Scratch:
    """Where the answers of a wake-up are put together. One a server: it is empty between two wake-ups."""
