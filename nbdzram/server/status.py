"""BLOCK_STATUS: from the engine's extents to descriptors of the metadata contexts.

Section names are those of doc/proto.md (see nbd.constants).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from nbdzram.engine.disk import Disk, Extent
from nbdzram.nbd.constants import CommandFlag, FoldState, MetaContext, ReplyStyle
from nbdzram.nbd.transmission import status_chunk
from nbdzram.nbd.verdicts import Asked, Verdict

DESCRIPTOR_LIMIT = 1 << 9
"""Descriptors in one chunk, made under Python's lock, which the event loop waits for: 8 KiB of reply at most. The
protocol advises at most 2**20 and lets a server stop early; a client asks on from there."""

STRAINED_DESCRIPTOR_LIMIT = 1 << 7
"""The same while the memory for replies is used up: 2 KiB of reply a context."""

WINDOW = 16 << 30
"""Bytes of export that one context is described over when blocks are stored there: 4 million table entries, a tenth of
a second of a thread that holds no lock of Python. Holes are passed over by whole tables, and go on for ever."""

_NARROW_LENGTH_LIMIT = (1 << 32) - 4096  # what a 32-bit descriptor holds, in whole blocks

_FOLD_STATES = {
    Extent.HOLE: FoldState.HOLE,
    Extent.SHARED: FoldState.SHARED,
    Extent.HUGE: FoldState.HUGE,
    Extent.SAME_FILLED: FoldState.SAME_FILLED,
}

_STATES: dict[MetaContext, dict[int, int]] = {
    MetaContext.ALLOCATION: {bits: bits for bits in range((Extent.HOLE | Extent.ZERO) + 1)},
    MetaContext.FOLD: {
        bits: sum(state for extent, state in _FOLD_STATES.items() if bits & extent)
        for bits in range(1 << len(Extent))
        if not bits & Extent.ZERO
    },
}
"""What a context says of an extent's bits. The engine joins neighbours that differ only in bits of no interest."""

_MASKS = {context: max(states) for context, states in _STATES.items()}


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


def status_reply(disk: Disk, style: ReplyStyle, request: StatusRequest, limit: int = DESCRIPTOR_LIMIT) -> bytes:
    """One chunk of at most `limit` descriptors a context. Any thread.

    The engine makes and joins the extents without Python's lock: as Python objects, one at a time, 16,384 of them took
    half a second, in which every other client waited for the lock.
    """
    last = len(request.contexts) - 1
    return b"".join(
        status_chunk(
            style,
            request.cookie,
            request.offset,
            context,
            _describe(disk, request, context, 1 if request.one else limit, narrow=style is not ReplyStyle.EXTENDED),
            done=index == last,
        )
        for index, context in enumerate(request.contexts)
    )


def _describe(
    disk: Disk, request: StatusRequest, context: MetaContext, limit: int, *, narrow: bool
) -> list[tuple[int, int]]:
    """Descriptors (length in bytes, status) from the beginning of the range, as far as the limits allow.

    Neighbours differ in their status. `narrow`: lengths fit 32 bits.
    """
    states, mask = _STATES[context], _MASKS[context]
    found: list[tuple[int, int]] = []
    position = 0
    while position < request.length and len(found) <= limit:
        window = min(WINDOW, request.length - position)
        step = disk.extents(request.offset + position, window, limit + 1 - len(found), mask)
        position += sum(length for length, _ in step)
        described = [(length, states[bits]) for length, bits in step]
        if found and found[-1][1] == described[0][1]:
            described[0] = (found.pop()[0] + described[0][0], described[0][1])
        found += described
        if len(step) > 1 or not step[0][1] & Extent.HOLE:
            break
    return _cut_to_32_bits(found[:limit]) if narrow else found[:limit]


def _cut_to_32_bits(descriptors: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All up to the first that does not fit, of which the beginning; the client asks on from there."""
    for index, (length, status) in enumerate(descriptors):
        if length > _NARROW_LENGTH_LIMIT:
            return [*descriptors[:index], (_NARROW_LENGTH_LIMIT, status)]
    return descriptors
