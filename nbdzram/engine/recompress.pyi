from nbdzram.engine.pool import Pool

class Recompress:
    """One recompression run, in bounded steps, without the interpreter lock: the shape of Fold.

    Objects that are LZ4 or raw, and whose blocks were last used at least `idle_seconds` ago, are encoded again with
    Zstandard at `level` (1..22) and kept so only if smaller. huge_only: raw objects alone. dictionary: train one from
    the pool's own blocks first, and use it where it saves more. Raises UserError for a level outside the range.
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
    def step(self, budget: int = 256) -> bool:
        """Look at up to `budget` blocks. True while there is more."""
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    def report(self) -> dict[str, int]:
        """objects_seen, objects_recompressed, bytes_before, bytes_after, dictionary_bytes."""
