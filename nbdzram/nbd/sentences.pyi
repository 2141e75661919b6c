def sentence(verdict: int, command: int, flags: int, offset: int, length: int, *, size: int, limit: int) -> str:
    """The sentence for a request, as its client gets it. `size`, `limit`: bytes, see verdicts.explain."""

def wire_error(verdict: int, command: int) -> int:
    """The error value on the wire."""
