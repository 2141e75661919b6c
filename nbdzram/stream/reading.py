"""Taking a stream apart: records out of bytes, each whole and in its place. Knows no pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nbdzram.engine.codec import digest_of
from nbdzram.errors import StreamCut, StreamError, UnknownFormat
from nbdzram.stream import layout
from nbdzram.stream.layout import CHECKSUM, CONTINUATION_MAGIC, FRAME, LARGEST_BODY, MAGIC, PREAMBLE, Kind
from nbdzram.stream.position import Position, read_continuation

CUT = "the stream ends in the middle: what sent it was interrupted, or the file is not whole"
EMPTY = "the stream is empty: what sent it failed, and says why, or the file has nothing in it"


class Counted:
    """What records() has read so far."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.records = 0
        self.digest = 0  # of all records that were given out


def opening(read: Callable[[int], bytes]) -> Position | None:
    """None: a stream comes, else what goes on with one from there; records() reads on, `begun`. Raises StreamError."""
    counted = Counted()
    preamble = _preamble(read, counted)
    if preamble.startswith(CONTINUATION_MAGIC):
        return read_continuation(preamble, lambda count: _exactly(read, count, counted))
    layout.check_preamble(preamble)
    return None


def identity_of(path: Path) -> bytes | None:
    """Of the stream in a file; None: none can be read there."""
    try:
        with path.open("rb") as file:
            _, header = next(records(file.read, Counted()))
            return layout.read_header(header).identity
    except (OSError, StreamError):
        return None


def records(
    read: Callable[[int], bytes], counted: Counted, *, salt: int = 0, alone: bool = True, begun: bool = False
) -> Iterator[tuple[Kind, memoryview]]:
    """Each record's kind and body, up to END with it; `read` gives up to so many bytes, none at the end.

    salt: of a group of a journal; alone: nothing is to follow it; begun: opening() was read, and `counted` is where it
    goes on.

    Raises StreamError, for anything that is not exactly what was written; StreamCut where what `counted` says so far
    was, and was given out.
    """
    if not begun:
        layout.check_preamble(_preamble(read, counted))
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
            raise UnknownFormat(
                f"record {counted.records} of the stream is of kind {number}, which this program does not know"
            ) from None
        if (kind is Kind.HEADER) != (counted.records == 0):
            raise StreamError("the stream is damaged: its header is not its first record")
        if kind is Kind.END:
            end = layout.read_end(memoryview(framed)[FRAME.size :])
            if (end.records, end.digest) != (counted.records, counted.digest):
                raise StreamError("the stream is damaged: its end record is not that of the records before it")
            if alone and read(1):
                raise StreamCut("the stream is damaged: there are bytes behind its end record")
        yield kind, memoryview(framed)[FRAME.size :]
        counted.records += 1
        counted.digest = layout.digest_on(counted.digest, checksum)


def _damaged(number: int) -> StreamCut:
    return StreamCut(f"the stream is damaged: record {number} is not what was written")


def _preamble(read: Callable[[int], bytes], counted: Counted) -> bytes:
    """Of a stream or of what goes on with one. However little else comes, it is neither, and not cut off."""
    found = _up_to(read, PREAMBLE.size, counted)
    if not found:
        raise StreamError(EMPTY)
    if not any(magic.startswith(found[: len(magic)]) for magic in (MAGIC, CONTINUATION_MAGIC)):
        raise StreamError("this is no nbdzram stream; it is what `nbdzram send` writes")
    return _whole(found, PREAMBLE.size)


def _exactly(read: Callable[[int], bytes], count: int, counted: Counted) -> bytes:
    return _whole(_up_to(read, count, counted), count)


def _whole(found: bytes, count: int) -> bytes:
    if len(found) < count:
        raise StreamCut(CUT)
    return found


def _up_to(read: Callable[[int], bytes], count: int, counted: Counted) -> bytes:
    """As many bytes as there are."""
    parts, missing = [], count
    while missing and (part := read(missing)):
        parts.append(part)
        missing -= len(part)
        counted.bytes_read += len(part)
    return b"".join(parts)
