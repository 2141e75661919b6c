from typing_extensions import Buffer

Parsed = tuple[int, int, int, bytes, int, int, int]

def request_at(source: Buffer, style: int) -> Parsed | None:
    """Parse one header: (its size, flags, command, cookie, offset, length, payload bytes behind it).

    None when `source` is too short. Raises ValueError for a bad magic.
    """

def verdict_on(
    request: Parsed,
    *,
    size: int,
    style: int,
    read_only: bool = False,
    context_count: int = 0,
    payload_limit: int = ...,
    unfragmented_limit: int = ...,
) -> int:
    """Judge what request_at returned. A Verdict's number."""

def read_reply(
    style: int,
    cookie: bytes,
    request_offset: int,
    offset: int,
    content: bytes,
    *,
    whole: bool = False,
    done: bool = True,
) -> bytes:
    """A READ reply with `content` from `offset`, as the hot path builds it."""

def status_chunk(
    style: int, cookie: bytes, request_offset: int, context: int, extents: list[tuple[int, int]], done: bool
) -> bytes:
    """One BLOCK_STATUS chunk: `extents` is a list of (length in bytes, status bits), none empty.

    With extended headers it is BLOCK_STATUS_EXT, which holds 64-bit lengths; otherwise they are below 2**32.
    """

def error_reply(
    style: int, cookie: bytes, request_offset: int, error: int, text: bytes, failed_at: int | None = None
) -> bytes:
    """An error reply with its explanation (a simple reply has none). `failed_at`: where it failed."""
