class Line:
    """The way to one peer."""

class SocketLine(Line):
    """A connected socket, which is the line's from now on."""

    def __init__(self, fd: int) -> None: ...
    def detach(self) -> int:
        """The same, which is the caller's from now on: its session let it go."""
    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
