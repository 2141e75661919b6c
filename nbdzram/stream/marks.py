"""How a stream stood behind each of its last records, so that it can go on from one of them.

    record   ... 17      18      19      20             written
    mark         17 <──  18 <──  19 <──  20
                  └─ going back to it forgets the objects that 18, 19 and 20 told

What lies between who sends and who receives when a pipe breaks is not known to either: sockets, pipes and ssh hold some
megabytes. So marks reach back further than that, and are bounded by what they take: a mark, and four bytes for each
object that its record told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nbdzram.engine.walk import Told
from nbdzram.errors import StreamError
from nbdzram.stream.position import Position
from nbdzram.units import format_size

MARKS_BYTES = 4 << 20
"""Of marks: some hundred MiB of a stream of objects of a usual size, and 37 MiB where each has but 20 bytes."""
MARK_BYTES = 256
"""Of a mark, beside the numbers of its objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A stream behind its first `records` records."""

    records: int
    digest: int  # of those
    pool: int
    source: int
    block: int
    told: Told  # of the pool; it knows what later records told as well
    numbers: bytes  # of the objects that the last of them told
    dictionaries: int
    blocks: int
    objects: int
    object_bytes: int


class Marks:
    """Those of one stream, one a record, the oldest first."""

    def __init__(self, limit_bytes: int = MARKS_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._marks: deque[Mark] = deque()
        self._bytes = 0

    def add(self, mark: Mark) -> None:
        """Of the next record. The oldest give way to it."""
        assert not self._marks or mark.records == self._marks[-1].records + 1
        self._marks.append(mark)
        self._bytes += MARK_BYTES + len(mark.numbers)
        while self._bytes > self._limit_bytes and len(self._marks) > 1:
            self._bytes -= MARK_BYTES + len(self._marks.popleft().numbers)

    def back_to(self, position: Position) -> Mark:
        """The mark there; what came after it is as if it had not been told. Raises StreamError: it is none of these."""
        name = position.identity.hex()
        if not self._marks or not self._marks[0].records <= position.records <= self._marks[-1].records:
            first, last = (self._marks[0].records, self._marks[-1].records) if self._marks else (0, 0)
            raise StreamError(
                f"the stream {name} cannot go on behind its record {position.records}: of what was sent "
                f"{format_size(self._limit_bytes)} are remembered, which reach from record {first} to {last}; send it "
                "anew, and give up what is kept of it with `nbdzram streams abandon`"
            )
        found = self._marks[position.records - self._marks[0].records]
        if found.digest != position.digest:
            raise StreamError(
                f"the token is none of the stream {name}: its first {position.records} records are others than those "
                "that were sent; take the token from where it is received (`nbdzram streams`)"
            )
        while self._marks[-1] is not found:
            gone = self._marks.pop()
            self._bytes -= MARK_BYTES + len(gone.numbers)
            gone.told.forget(gone.numbers)
        return found
