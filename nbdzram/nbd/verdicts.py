"""What can become of a request, the error that goes on the wire, and the sentence that explains it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from nbdzram.nbd.constants import Command, CommandFlag, Error


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


_ERRORS = {
    Verdict.UNKNOWN_COMMAND: Error.EINVAL,
    Verdict.WRONG_FLAGS: Error.EINVAL,
    Verdict.READ_ONLY: Error.EPERM,
    Verdict.OUT_OF_RANGE: Error.EINVAL,
    Verdict.TOO_LONG: Error.EINVAL,
    Verdict.FRAGMENTED: Error.EOVERFLOW,
    Verdict.NO_CONTEXT: Error.EINVAL,
    Verdict.WRONG_SHAPE: Error.EINVAL,
    Verdict.POOL_FULL: Error.ENOSPC,
    Verdict.UNREADABLE: Error.EIO,
    Verdict.NOT_SYNCED: Error.EIO,
}


def error_of(verdict: Verdict, command: int) -> Error:
    """The value on the wire: section "Error values". Past the end, what would store gets ENOSPC."""
    if verdict is Verdict.OUT_OF_RANGE and command in (Command.WRITE, Command.WRITE_ZEROES):
        return Error.ENOSPC
    return _ERRORS[verdict]


def explain(verdict: Verdict, asked: Asked, *, size: int, limit: int) -> str:
    """One sentence for the client's error text and for the log: what, the value, the limit.

    `size` is the export's; `limit` the payload limit, or for FRAGMENTED that of unfragmented reads. Bytes.
    """
    command, flags = asked.command, asked.flags
    name = command_name(command)
    what = f"{name} of {asked.length} bytes at {asked.offset}"
    sentences = {
        Verdict.OK: f"{what} succeeded",
        Verdict.UNKNOWN_COMMAND: f"command {command} is not known",
        Verdict.WRONG_FLAGS: f"{name} with flags {flags:#x} ({flag_names(flags)}) is not allowed here",
        Verdict.READ_ONLY: f"{what}: the export is read-only",
        Verdict.OUT_OF_RANGE: f"{what} goes past the end of the export ({size} bytes)",
        Verdict.TOO_LONG: f"{what}: at most {limit} bytes a request are served",
        Verdict.FRAGMENTED: f"{what} with DF: at most {limit} bytes are sent unfragmented",
        Verdict.NO_CONTEXT: f"{what}: SET_META_CONTEXT selected no metadata context for this export",
        Verdict.WRONG_SHAPE: f"{what} is not a valid form of this request",
        Verdict.POOL_FULL: f"{what}: the pool is at its memory limit",
        Verdict.UNREADABLE: f"{what}: stored bytes do not decode",
        Verdict.NOT_SYNCED: f"{what}: the disk below the state directory did not take what was stored",
    }
    return sentences[verdict]


def command_name(command: int) -> str:
    """READ, WRITE... or the number of an unknown command."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command}"


def flag_names(flags: int) -> str:
    """FUA|DF...; unknown bits as a number."""
    return CommandFlag(flags).name or f"{flags:#x}"
