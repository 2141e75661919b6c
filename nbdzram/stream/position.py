"""How far a stream has come, and the head of what goes on from there.

    position       identity of the stream | how many records are whole | digest of those
    token          the same for a person to hand on: 32 hex digits - a number - 16 hex digits
    continuation   preamble with a magic of its own | position | XXH3 of all before 8 | the records that follow

Who receives tells its position, who sends goes on behind it. So what was whole, and the records of the continuation,
are one stream: numbers, checksums and digest go on as if nothing had happened.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from nbdzram.engine.codec import digest_of
from nbdzram.errors import StreamError
from nbdzram.stream.layout import CHECKSUM, CONTINUATION_MAGIC, PREAMBLE, VERSION, check_version

POSITION = struct.Struct("<16sQQ")
_TOKEN = re.compile(r"([0-9a-f]{32})-(\d{1,19})-([0-9a-f]{16})")
_IDENTITY = re.compile(r"([0-9a-f]{32})(?:-.*)?")


@dataclass(frozen=True, slots=True)
class Position:
    """Behind so many records of the stream with this identity; `digest` binds them."""

    identity: bytes
    records: int
    digest: int

    @property
    def token(self) -> str:
        """As a person hands it on."""
        return f"{self.identity.hex()}-{self.records}-{self.digest:016x}"


def read_token(token: str) -> Position:
    """Raises StreamError."""
    found = _TOKEN.fullmatch(token.strip())
    if found is None:
        raise StreamError(
            f"{token[:80]!r} is no token; `nbdzram streams` shows those of what is kept where it is received"
        )
    return Position(bytes.fromhex(found[1]), int(found[2]), int(found[3], 16))


def read_identity(text: str) -> bytes:
    """Of a stream, as it stands alone or at the beginning of a token. Raises StreamError."""
    found = _IDENTITY.fullmatch(text.strip())
    if found is None:
        raise StreamError(f"{text[:80]!r} names no stream; `nbdzram streams` shows the names and tokens")
    return bytes.fromhex(found[1])


def continuation(position: Position, features: int = 0) -> bytes:
    """What a continuation begins with; `features` are those of the stream."""
    body = PREAMBLE.pack(CONTINUATION_MAGIC, VERSION, features)
    body += POSITION.pack(position.identity, position.records, position.digest)
    return body + CHECKSUM.pack(digest_of(body, 0))


def read_continuation(preamble: bytes, exactly: Callable[[int], bytes]) -> Position:
    """Behind its preamble. Raises StreamError."""
    _, version, features = PREAMBLE.unpack(preamble)
    check_version(version, features)
    body = preamble + exactly(POSITION.size)
    if exactly(CHECKSUM.size) != CHECKSUM.pack(digest_of(body, 0)):
        raise StreamError("the stream is damaged: the head of its continuation is not what was written")
    return Position(*POSITION.unpack_from(body, PREAMBLE.size))
