"""What can become of a request, the error that goes on the wire, and the sentence that explains it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from nbdzram.nbd.constants import Error
from nbdzram.nbd.sentences import sentence, wire_error


class Verdict(IntEnum):
    """Numbered as in transmission.pxd; also the fixed set of error causes that metrics count."""

    OK = 0
    UNKNOWN_COMMAND = 1
    WRONG_FLAGS = 2
    READ_ONLY = 3
    OUT_OF_RANGE = 4
    TOO_LONG = 5
    FRAGMENTED = 6
    NO_CONTEXT = 7
    WRONG_SHAPE = 8
    POOL_FULL = 9
    UNREADABLE = 10
    NOT_SYNCED = 11
    OVER_QUOTA = 12

    @property
    def invalid_io(self) -> bool:
        """The request itself was wrong (zram's io_stat counts these as invalid_io)."""
        return Verdict.UNKNOWN_COMMAND <= self <= Verdict.WRONG_SHAPE


class Asked(NamedTuple):
    """A request as Python sees it. The cookie is opaque; offset and length are bytes."""

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int


def error_of(verdict: Verdict, command: int) -> Error:
    """The value on the wire: section "Error values". Past the end, what would store gets ENOSPC."""
    return Error(wire_error(verdict, command))


def explain(verdict: Verdict, asked: Asked, *, size: int, limit: int) -> str:
    """One sentence for the client's error text and for the log: what, the value, the limit.

    `size` is the export's; `limit` the payload limit, or for FRAGMENTED that of unfragmented reads. Bytes.
    """
    return sentence(verdict, asked.command, asked.flags, asked.offset, asked.length, size=size, limit=limit)
