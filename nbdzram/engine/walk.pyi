from nbdzram.engine.disk import Disk

class Told:
    """Which objects of a pool a stream has told: two bits a handle at most."""

    def __init__(self) -> None: ...
    def forget(self, numbers: bytes) -> None:
        """As if these had not been told: numbers as Walk.numbers has them."""

def leaves_apart(disk: Disk, origin: Disk | None, limit: int) -> int:
    """How many leaves of a copy (2 MiB each) a walk would look at, up to `limit`; that also where one of them cannot be
    read. May take milliseconds."""

class Walk:
    """The blocks of a concealed copy that are not what they are in `origin`, a copy too; None: all is a hole there.

    Of one thread at a time. Needs some hundred KiB, and what `told` needs.
    """

    def __init__(self, disk: Disk, origin: Disk | None, told: Told, first: int = 0) -> None:
        """From the block `first` on."""
    def step(self) -> tuple[int, int, int, bytes, bytes] | None:
        """Enough for a record of objects and one of blocks; None when all is told.

        The block that the runs begin at, how many blocks they tell, bits of the dictionaries that the objects need, the
        objects that were not told yet, and the runs. Raises EngineError: a block is not what was written, a copy is
        gone.
        """
    @property
    def numbers(self) -> bytes:
        """Of the objects that the last step told, four bytes each."""
    @property
    def position(self) -> int:
        """Behind what the last step told: another walk goes on from there."""
    @property
    def progress(self) -> float:
        """Of the disk's blocks, the part that is behind."""

def blocks_apart(disk: Disk, origin: Disk | None, limit: int) -> int:
    """How many blocks of a copy a walk would tell, up to `limit`; some of them may have been rewritten as they were."""
