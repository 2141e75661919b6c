from typing_extensions import Buffer

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool

class Absorber:
    """What a stream tells, stored in concealed disks of one pool. Of one thread at a time.

    Raises StreamError for what no stream says, PoolFull, EngineError (the pool closes).
    """

    def __init__(self, pool: Pool) -> None: ...
    def dictionary(self, number: int, content: Buffer) -> None:
        """What the objects from here on that say so are encoded with."""
    def take_objects(self, staging: Disk, body: Buffer) -> None:
        """Objects, which blocks of disks of the same folding domain as `staging` may name."""
    def take_blocks(self, disk: Disk, staging: Disk, first: int, runs: Buffer) -> None:
        """Runs of blocks from `first` on."""
    def end_disk(self, disk: Disk) -> None:
        """All its blocks have come: what its last one holds behind the end is cleared."""
    @property
    def objects(self) -> int: ...
    @property
    def object_bytes(self) -> int: ...
    @property
    def objects_folded(self) -> int:
        """Those that the pool had already."""
    @property
    def objects_encoded_again(self) -> int:
        """Those whose dictionary the pool has no place for."""
    @property
    def blocks(self) -> int: ...
