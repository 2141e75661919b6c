"""Taking a stream apart: records out of bytes, each whole and in its place. Knows no pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nbdzram.engine.codec import digest_of
from nbdzram.errors import StreamError
from nbdzram.stream import layout
from nbdzram.stream.layout import CHECKSUM, FRAME, LARGEST_BODY, PREAMBLE, Kind

CUT = "the stream ends in the middle: what sent it was interrupted, or the file is not whole"


class Counted:
    """What records() has read so far."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.records = 0
        self.digest = 0  # of all records that were given out


def records(
    read: Callable[[int], bytes], counted: Counted, *, salt: int = 0, alone: bool = True
) -> Iterator[tuple[Kind, memoryview]]:
    """Each record's kind and body, up to END with it; `read` gives up to so many bytes, none at the end.

    salt: of a group of a journal; alone: nothing is to follow it.

    Raises StreamError, for anything that is not exactly what was written.
    """
    layout.check_preamble(_exactly(read, PREAMBLE.size, counted))
    kind = None
    while kind is not Kind.END:
        frame = _exactly(read, FRAME.size, counted)
        length, number, nothing = FRAME.unpack(frame)
        if length > LARGEST_BODY or nothing:
            raise _damaged(counted.records)
        framed = frame + _exactly(read, length, counted)
        (checksum,) = CHECKSUM.unpack(_exactly(read, CHECKSUM.size, counted))
        if digest_of(framed, layout.seed_of(salt, counted.records)) != checksum:
            raise _damaged(counted.records)
        try:
            kind = Kind(number)
        except ValueError:
            raise StreamError(
                f"record {counted.records} of the stream is of kind {number}, which this program does not know"
            ) from None
        if (kind is Kind.HEADER) != (counted.records == 0):
            raise StreamError("the stream is damaged: its header is not its first record")
        if kind is Kind.END:
            end = layout.read_end(memoryview(framed)[FRAME.size :])
            if (end.records, end.digest) != (counted.records, counted.digest):
                raise StreamError("the stream is damaged: its end record is not that of the records before it")
        yield kind, memoryview(framed)[FRAME.size :]
        counted.records += 1
        counted.digest = layout.digest_on(counted.digest, checksum)
    if alone and read(1):
        raise StreamError("the stream is damaged: there are bytes behind its end record")


def _damaged(number: int) -> StreamError:
    return StreamError(f"the stream is damaged: record {number} is not what was written")


def _exactly(read: Callable[[int], bytes], count: int, counted: Counted) -> bytes:
    parts, missing = [], count
    while missing:
        part = read(missing)
        if not part:
            raise StreamError(CUT)
        parts.append(part)
        missing -= len(part)
        counted.bytes_read += len(part)
    return b"".join(parts)
