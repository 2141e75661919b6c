from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import CheckReport
from nbdzram.engine.run import Run

class Check(Run[CheckReport]):
    """One check: every object is decoded and held against its fingerprint (contents), every count against a recount.

    step() raises CheckFailed. A second check of a pool takes the first one's place: that one
    begins its recount again.
    """

    def __init__(self, pool: Pool, *, contents: bool = True) -> None: ...
