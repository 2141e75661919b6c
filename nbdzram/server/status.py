"""BLOCK_STATUS: from the engine's extents to descriptors of the metadata contexts.

Section names are those of doc/proto.md (see nbd.constants).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from nbdzram.engine.disk import Disk, Extent
from nbdzram.nbd.constants import CommandFlag, FoldState, MetaContext, ReplyStyle
from nbdzram.nbd.transmission import status_chunk
from nbdzram.nbd.verdicts import Asked, Verdict

DESCRIPTOR_LIMIT = 1 << 14
"""Descriptors in one chunk: 256 KiB of reply at most. The protocol advises at most 2**20 and lets a server
stop early; a client asks on from there."""

EXTENT_STEP = 1 << 12
"""Extents taken from the engine at once: as Python objects they hold half a megabyte."""

EXTENTS_SEEN_LIMIT = 1 << 16
"""Extents looked at for one request, so that ranges that differ only in bits of no interest end in bounded
time."""

_NARROW_LENGTH_LIMIT = (1 << 32) - 4096  # what a 32-bit descriptor holds, in whole blocks

_FOLD_STATES = (
    (Extent.HOLE, FoldState.HOLE),
    (Extent.SHARED, FoldState.SHARED),
    (Extent.HUGE, FoldState.HUGE),
    (Extent.SAME_FILLED, FoldState.SAME_FILLED),
)


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """A judged BLOCK_STATUS. Bytes."""

    cookie: bytes
    offset: int
    length: int
    contexts: tuple[MetaContext, ...]
    one: bool


def parse_status(
    asked: Asked, payload: bytes | None, contexts: tuple[MetaContext, ...], size_bytes: int
) -> StatusRequest | Verdict:
    """The request, or why it is refused.

    `payload` (extended headers with PAYLOAD_LEN) holds the effect length and the ids of the wanted contexts.
    """
    length = asked.length
    if payload is not None:
        if len(payload) < 8 or len(payload) % 4:
            return Verdict.WRONG_SHAPE
        length = int.from_bytes(payload[:8])
        ids = [value for (value,) in struct.iter_unpack(">I", payload[8:])]
        by_id = {int(context): context for context in contexts}
        if len(set(ids)) != len(ids) or not all(value in by_id for value in ids) or not ids:
            return Verdict.WRONG_SHAPE
        contexts = tuple(by_id[value] for value in ids)
    if length == 0:
        return Verdict.WRONG_SHAPE
    if asked.offset > size_bytes or length > size_bytes - asked.offset:
        return Verdict.OUT_OF_RANGE
    return StatusRequest(asked.cookie, asked.offset, length, contexts, bool(asked.flags & CommandFlag.REQ_ONE))


def status_reply(disk: Disk, style: ReplyStyle, request: StatusRequest) -> bytes:
    """One chunk a context. Any thread."""
    lists = describe(disk, request, narrow=style is not ReplyStyle.EXTENDED)
    last = len(request.contexts) - 1
    return b"".join(
        status_chunk(style, request.cookie, request.offset, context, descriptors, done=index == last)
        for index, (context, descriptors) in enumerate(zip(request.contexts, lists, strict=True))
    )


def describe(disk: Disk, request: StatusRequest, *, narrow: bool) -> list[list[tuple[int, int]]]:
    """For each context its descriptors (length in bytes, status), neighbours of equal status joined.

    Each list covers the range from its beginning, as far as the limits allow; `narrow`: lengths fit 32 bits.
    """
    limit = 1 if request.one else DESCRIPTOR_LIMIT
    collectors = [_Collector(_STATUS[context], limit, narrow=narrow) for context in request.contexts]
    position, seen = 0, 0
    while position < request.length and seen < EXTENTS_SEEN_LIMIT:
        step = disk.extents(request.offset + position, request.length - position, EXTENT_STEP)
        for length, bits in step:
            for collector in collectors:
                collector.add(length, bits)
            position += length
        seen += len(step)
        if all(collector.full for collector in collectors):
            break
    return [collector.descriptors for collector in collectors]


class _Collector:
    """Joins extents of equal status, up to a number of descriptors."""

    def __init__(self, status: Callable[[int], int], limit: int, *, narrow: bool) -> None:
        self.descriptors: list[tuple[int, int]] = []
        self.full = False
        self._status = status
        self._limit = limit
        self._narrow = narrow

    def add(self, length: int, bits: int) -> None:
        if self.full:
            return
        status = self._status(bits)
        if self.descriptors and self.descriptors[-1][1] == status:
            length += self.descriptors.pop()[0]
        elif len(self.descriptors) == self._limit:
            self.full = True
            return
        if self._narrow and length > _NARROW_LENGTH_LIMIT:
            length = _NARROW_LENGTH_LIMIT
            self.full = True  # the client asks on from here
        self.descriptors.append((length, status))


def _allocation_status(bits: int) -> int:
    return bits & (Extent.HOLE | Extent.ZERO)


def _fold_status(bits: int) -> int:
    status = 0
    for extent, state in _FOLD_STATES:
        if bits & extent:
            status |= state
    return status


_STATUS: dict[MetaContext, Callable[[int], int]] = {
    MetaContext.ALLOCATION: _allocation_status,
    MetaContext.FOLD: _fold_status,
}
