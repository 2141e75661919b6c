"""The error tree, and its map to the error values of the NBD protocol.

An error has one owner: a RequestError answers one cookie, a ProtocolError ends one connection, PoolFull becomes
ENOSPC on the wire. A UserError is shown to a person as one sentence: the thing, the value, the limit, the remedy.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

NAMES_TOLD = 10
"""Of what there is instead of what was asked for; a server may have thousands."""


class NbdzramError(Exception):
    """Every error that this package raises on purpose."""


class UserError(NbdzramError):
    """A person's mistake or a refusal of the machine: one sentence, no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """A wrong value in a flag, the environment or a TOML file."""

    exit_code = 2


class ServerUnreachable(UserError):
    """Nothing answers on the control socket."""

    exit_code = 3


class NoServerHere(ServerUnreachable):
    """No control socket is where servers put theirs."""


class NoSuchExport(UserError):
    """The named export, snapshot or pool does not exist."""

    exit_code = 4

    @classmethod
    def among(cls, known: Iterable[str], name: str, kind: str = "export") -> NoSuchExport:
        """In a sentence that a person can use: who mistyped sees the names, and of hundreds that these are not all."""
        names = list(known)
        more = [f"and {len(names) - NAMES_TOLD} more"] * (len(names) > NAMES_TOLD)
        told = [name if name == name.strip() else repr(name) for name in names[:NAMES_TOLD]] + more  # units.said
        return cls(f"there is no {kind} '{name}'; there are: {', '.join(told) or 'none'}")


class ExportExists(UserError):
    """The name is taken."""


class RunCancelled(UserError):
    """Somebody cancelled the maintenance run that is waited for."""

    exit_code = 130  # as if it had been interrupted here


class StreamError(UserError):
    """A stream that is damaged, cut off, or of a kind that this program does not know."""


class UnknownFormat(StreamError):
    """A stream, or a journal, as a later version of this program writes them, or of Python: it is not damaged."""


class UnreadableExport(StreamError):
    """A stream that ended at an export whose blocks are not what was written; all before `block` had been told."""

    def __init__(self, name: str, why: str, block: int) -> None:
        super().__init__(f"the export '{name}' cannot be sent: {why}")
        self.name = name
        self.block = block


class StreamCut(StreamError):
    """A stream that ended, or was damaged, behind a record that is whole: it can go on from there."""


class CodecUnavailable(UserError):
    """A compressor's C functions cannot be found."""


class TlsUnavailable(UserError):
    """OpenSSL's C functions cannot be found."""


class TlsError(NbdzramError):
    """TLS with a peer cannot go on, or a file cannot be used for it. The words are OpenSSL's."""


class PassPhraseWanted(TlsError):
    """A key is encrypted, and OpenSSL would ask somebody."""


class ArenaError(UserError):
    """The arena's file cannot be opened, is in use, or is not one of ours."""


class ArenaInUse(ArenaError):
    """Another process has it open."""


class EngineError(NbdzramError):
    """The engine refuses an operation."""


class PoolFull(EngineError):
    """The pool is at its memory limit (or its file system is full); nothing stored was changed."""


class CheckFailed(EngineError):
    """An invariant of the engine does not hold: our bug, or memory that changed under us."""


class ProtocolError(NbdzramError):
    """The peer broke the protocol; its connection ends."""


class RequestError(NbdzramError):
    """One request cannot be served; its cookie is answered with `error`, the connection goes on."""

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error


def full_because(mem_limit: int) -> str:
    """Why a pool with this limit took no more, and the first of what helps; 0: it has none."""
    if not mem_limit:
        return "memory is exhausted, or the file system of the state directory is full; free some of it"
    return f"the pool is at its limit of {mem_limit} bytes, or memory is exhausted; raise the limit"


def reason_of(error: BaseException) -> str:
    """What the system says of it; of what is no error of the system's, what Python says, which has no words for memory
    that ended."""
    says = getattr(error, "strerror", None) or str(error)
    return says or os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else says
