"""The NBD protocol as bytes, a second time: what tests send, and what they expect. No I/O.

Written from the NBD project's doc/proto.md and independent of nbdzram.nbd on purpose, so that a wrong constant in the
server meets a right one. Two clients are made of it, because neither can do the other's work:

    support.nbd_client    blocks; for a server that is a process of its own, and for benchmarks
    support.loop_client   waits in the test's event loop; for a server that runs in the same loop, and any reply style
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 8, 9, 10, 11
REP_ACK, REP_INFO = 1, 3
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = 2**31 + 1, 2**31 + 3, 2**31 + 6
INFO_EXPORT = 0
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
FLAG_NO_HOLE = 1 << 1
FLAG_PAYLOAD_LEN = 1 << 5
EINVAL, ENOSPC = 22, 28


@dataclass(frozen=True, slots=True)
class OptionReply:
    option: int
    kind: int
    data: bytes

    @property
    def failed(self) -> bool:
        return bool(self.kind & 1 << 31)


def client_hello(flags: int = 3) -> bytes:
    """The client's first word: fixed newstyle, no zeroes."""
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", *, size: int | None = None) -> bytes:
    """`size`: the length that is announced, when it is to be another than that of `data`."""
    return OPTION.pack(IHAVEOPT, number, len(data) if size is None else size) + data


def name_and_infos(name: bytes, *infos: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def name_and_queries(name: bytes, *queries: bytes) -> bytes:
    parts = [struct.pack(">I", len(name)) + name, struct.pack(">I", len(queries))]
    return b"".join([*parts, *(struct.pack(">I", len(query)) + query for query in queries)])


def request(
    command: int, offset: int, length: int, *, flags: int = 0, cookie: int = 1, extended: bool = False
) -> bytes:
    if extended:
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def split_option_replies(raw: bytes) -> list[OptionReply]:
    replies = []
    while raw:
        magic, number, kind, size = OPTION_REPLY.unpack(raw[:20])
        assert magic == OPTION_REPLY_MAGIC
        assert len(raw) >= 20 + size
        replies.append(OptionReply(number, kind, raw[20 : 20 + size]))
        raw = raw[20 + size :]
    return replies
