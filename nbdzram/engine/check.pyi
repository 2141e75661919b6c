from nbdzram.engine.pool import Pool
from nbdzram.engine.run import Run

class Check(Run):
    """One check: every object is decoded and held against its fingerprint (contents), every count against a recount.

    report(): objects_checked; changing, the cells, nodes and zspages that clients changed during the recount, and that
    were passed over. step() raises CheckFailed. A second check of a pool takes the first one's place: that one
    begins its recount again.
    """

    def __init__(self, pool: Pool, *, contents: bool = True) -> None: ...
