from nbdzram.engine.pool import Pool

def dictionary_of(pool: Pool, number: int) -> bytes:
    """The content of dictionary `number`. Raises EngineError when there is none, or it is not what was written."""
