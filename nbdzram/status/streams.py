"""Of streams: sent, received, kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SendReport:
    """A stream that was sent to its end."""

    exports: tuple[str, ...]
    blocks: int  # stored ones, or those that changed
    objects: int  # each once, however many blocks hold it
    object_bytes: int  # of them, as they are stored
    stream_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReceiveReport:
    """A stream that was received to its end, and is offered."""

    exports: tuple[str, ...]
    blocks: int
    objects: int
    objects_folded: int  # of them, those that the pool had already
    object_bytes: int
    stream_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """A stream that is under way, or of which something is kept after it was interrupted."""

    stream: str  # its identity, the same where it is sent and where it is received
    way: str  # sent, or received
    state: str  # under way, or kept
    exports: tuple[str, ...]
    records: int  # that were written, or came whole
    stream_bytes: int  # since it began or went on
    seconds_left: float | None  # for which it is kept at most; None: it is under way
    token: str | None  # with which `nbdzram send --resume` goes on; None: it is under way, or sent
