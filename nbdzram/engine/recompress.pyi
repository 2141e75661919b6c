from nbdzram.engine.pool import Pool
from nbdzram.engine.reports import RecompressReport
from nbdzram.engine.run import Run

class Recompress(Run[RecompressReport]):
    """One recompression run.

    Objects whose blocks were last used at least `idle_seconds` ago are encoded again with Zstandard at `level` (1..22)
    and kept so only if smaller; a run tries what no run as strong has tried. huge_only: raw objects alone. dictionary:
    train one from the pool's own blocks first, and use it where it saves more. Raises UserError for a level outside the
    range.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        level: int = 3,
        idle_seconds: int = 0,
        huge_only: bool = False,
        dictionary: bool = False,
    ) -> None: ...
