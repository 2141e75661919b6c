STORED_LIMIT: int
PACE_SECONDS: int
PACE_BYTES: int

class Turns:
    """Whose payload is stored as it arrives while memory is short. One a server; any thread."""

    @property
    def waiting(self) -> int:
        """Clients that nobody reads until their turn comes."""
    def watch(self) -> None:
        """Once a second: cut who keeps others waiting and sends too little."""
