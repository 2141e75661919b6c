from typing import Generic, TypeVar

from nbdzram.engine.pool import Pool

R_co = TypeVar("R_co", covariant=True)

HOLD_COUNT: int
"""Handles, zspages or entries that a run looks at under one hold of the pool's lock."""

class Run(Generic[R_co]):
    """One run over a pool in bounded steps, without the interpreter lock; clients go on meanwhile.

    Call step() from a thread of its own until it returns False.
    """

    def __init__(self, pool: Pool) -> None: ...
    def step(self, budget: int = 4096) -> bool:
        """Look at about `budget` things. True while there is more."""
    @property
    def done(self) -> int:
        """Work done, in the run's own measure; its share of `total` is that of the time."""
    @property
    def total(self) -> int:
        """Work to do, as far as is known."""
    def report(self) -> R_co:
        """What came of it so far, a record of its kind (reports.py)."""
