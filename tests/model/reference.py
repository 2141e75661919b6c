"""The transmission phase as a plain program over a bytearray: what a server must answer, without any of its machinery.

Written from doc/proto.md of the NBD project and from nothing of nbdzram.nbd, so that the two can be compared. Where the
protocol leaves a choice, it says what this server chose (docs/protocol.md lists these choices).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
SIMPLE, STRUCTURED, EXTENDED = range(3)
EPERM, EINVAL, ENOSPC, EOVERFLOW = 1, 22, 28, 75
BLOCK = 4096
PAYLOAD_LIMIT = 64 << 20
UNFRAGMENTED_LIMIT = 256 << 10  # our choice; at least 64 KiB

_COMPACT = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHHQQQ")


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it stood on the wire."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the one reply to a request must say: `content` of a successful READ, `end` where a STATUS may reach."""

    request: Request
    error: int = 0
    content: bytes = b""


@dataclass(slots=True)
class PlainExport:
    """An export as bytes. `contexts`: how many metadata contexts were negotiated."""

    content: bytearray
    style: int
    contexts: int = 0
    read_only: bool = False

    def answer(self, request: Request) -> Expected:
        """Judge, perform, reply."""
        error = self._judge(request)
        if error:
            return Expected(request, error)
        end = request.offset + request.length
        match request.command:
            case 0:
                return Expected(request, content=bytes(self.content[request.offset : end]))
            case 1:
                self.content[request.offset : end] = request.payload
            case 6:
                self.content[request.offset : end] = bytes(request.length)
            case 4:  # whole blocks become holes
                first, last = -(-request.offset // BLOCK) * BLOCK, end // BLOCK * BLOCK
                if first < last:
                    self.content[first:last] = bytes(last - first)
        return Expected(request)

    def _judge(self, request: Request) -> int:  # noqa: PLR0911  (one return a rule, in the order of the rules)
        if request.flags & ~self._allowed_flags(request.command) or request.command > STATUS:
            return EINVAL
        if self.read_only and request.command in (WRITE, TRIM, ZEROES):
            return EPERM
        if request.command == FLUSH:
            return EINVAL if request.offset or request.length else 0
        offset, length = request.offset, request.length
        if request.command == STATUS:
            if not self.contexts:
                return EINVAL
            if request.flags & PAYLOAD_LEN:
                return self._judge_status_payload(request)
            if length == 0:
                return EINVAL
        if offset + length > len(self.content):
            return ENOSPC if request.command in (WRITE, ZEROES) else EINVAL
        if request.command == READ and length > PAYLOAD_LIMIT:
            return EINVAL
        if request.command == READ and request.flags & DF and length > UNFRAGMENTED_LIMIT:
            return EOVERFLOW
        return 0

    def _judge_status_payload(self, request: Request) -> int:
        payload = request.payload
        if not 12 <= len(payload) <= 4096 or len(payload) % 4:
            return EINVAL
        length = int.from_bytes(payload[:8])
        ids = [int.from_bytes(payload[at : at + 4]) for at in range(8, len(payload), 4)]
        if len(set(ids)) != len(ids) or not set(ids) <= set(range(1, self.contexts + 1)):
            return EINVAL
        return EINVAL if length == 0 or request.offset + length > len(self.content) else 0

    def _allowed_flags(self, command: int) -> int:
        payload = PAYLOAD_LEN if self.style == EXTENDED else 0
        return FUA | {
            READ: DF if self.style != SIMPLE else 0,
            WRITE: payload,
            ZEROES: NO_HOLE | FAST_ZERO,
            STATUS: REQ_ONE | payload,
        }.get(command, 0)


def parse(stream: bytes, style: int) -> tuple[list[Request], bool]:
    """The complete requests in front of DISC, the end, or nonsense; True when the stream ends in nonsense."""
    requests: list[Request] = []
    form = _EXTENDED if style == EXTENDED else _COMPACT
    magic = 0x21E41C71 if style == EXTENDED else 0x25609513
    at = 0
    while len(stream) - at >= form.size:
        found, flags, command, cookie, offset, length = form.unpack_from(stream, at)
        if found != magic:
            return requests, True
        carries = command == WRITE or (style == EXTENDED and bool(flags & PAYLOAD_LEN))
        if carries and length > PAYLOAD_LIMIT:
            return requests, True
        if command == DISC:
            return requests, False
        at += form.size
        payload = stream[at : at + length] if carries else b""
        if carries and len(payload) < length:
            return requests, False
        at += len(payload)
        requests.append(Request(command, flags, cookie, offset, length, payload))
    return requests, False


def take_reply(raw: bytes, at: int, expected: Expected, style: int) -> tuple[int, list[tuple[int, bytes]]]:
    """Hold the reply at `at` to what is expected; where it ends, and its status chunks."""
    request = expected.request
    if style == SIMPLE:
        magic, error, cookie = struct.unpack_from(">IIQ", raw, at)
        assert (magic, error, cookie) == (0x67446698, expected.error, request.cookie), (hex(magic), error, request)
        at += 16
        assert raw[at : at + len(expected.content)] == expected.content
        return at + len(expected.content), []
    covered: dict[int, bytes] = {}
    status: list[tuple[int, bytes]] = []
    error = 0
    while True:
        at, flags, kind, payload = _take_chunk(raw, at, request, style)
        if kind == 1:
            covered[int.from_bytes(payload[:8])] = payload[8:]
            assert len(payload) >= 9
        elif kind == 2:
            assert len(payload) == 12
            covered[int.from_bytes(payload[:8])] = bytes(int.from_bytes(payload[8:]))
        elif kind == (6 if style == EXTENDED else 5):
            status.append((int.from_bytes(payload[:4]), payload))
        elif kind & 0x8000:
            error, size = struct.unpack_from(">IH", payload)
            assert error
            assert size <= 4096
            payload[6 : 6 + size].decode()
        else:
            assert kind == 0
            assert not payload
            assert flags & 1
        if flags & 1:
            break
    assert error == expected.error, (error, expected)
    if request.command == READ and not error:
        position, content = request.offset, b""
        for offset in sorted(covered):
            assert offset == position, "the chunks overlap or leave a gap"
            content += covered[offset]
            position += len(covered[offset])
        assert content == expected.content
        assert not request.flags & DF or len(covered) <= 1
    return at, status


def _take_chunk(raw: bytes, at: int, request: Request, style: int) -> tuple[int, int, int, bytes]:
    if style == EXTENDED:
        magic, flags, kind, cookie, offset, size = struct.unpack_from(">IHHQQQ", raw, at)
        assert offset == request.offset
        at += 32
    else:
        magic, flags, kind, cookie, size = struct.unpack_from(">IHHQI", raw, at)
        at += 20
    assert magic == (0x6E8A278C if style == EXTENDED else 0x668E33EF), hex(magic)
    assert cookie == request.cookie
    assert flags in (0, 1)
    payload = raw[at : at + size]
    assert len(payload) == size
    return at + size, flags, kind, payload


def check_status(payload: bytes, request: Request, content: bytes, style: int) -> None:
    """A chunk of base:allocation tells the truth about `content`: what is said to be zero is."""
    wide = style == EXTENDED
    head, form = (8, ">QQ") if wide else (4, ">II")
    assert not wide or int.from_bytes(payload[4:8]) == (len(payload) - 8) // 16
    length = int.from_bytes(request.payload[:8]) if request.flags & PAYLOAD_LEN else request.length
    extents = list(struct.iter_unpack(form, payload[head:]))
    assert extents
    assert not request.flags & REQ_ONE or len(extents) == 1
    position = request.offset
    for size, bits in extents:
        assert size > 0
        assert position + size <= request.offset + length
        assert not bits & ~3
        if bits & 2:
            assert not any(content[position : position + size]), "an extent is said to be zero and is not"
        position += size
    assert all(one[1] != two[1] for one, two in pairwise(extents)), "not coalesced"
