def load() -> None:
    """Find libssl's functions, once. Raises TlsUnavailable."""
