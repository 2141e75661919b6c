class Purse:
    """The sum of what several pools take, and its ceiling. Any thread may ask and set."""

    @property
    def used(self) -> int:
        """Bytes that the pools which share it take."""
    @property
    def ceiling(self) -> int:
        """Bytes that they may take, whatever their own limits; 0 is none. What is stored stays."""
    @ceiling.setter
    def ceiling(self, most: int) -> None: ...
