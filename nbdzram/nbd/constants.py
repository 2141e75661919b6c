"""Numbers on the wire, each from doc/proto.md of NetworkBlockDevice/nbd (sections named beside them).

Extended headers are from its branch extension-ext-header. All integers travel big-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"; section "Newstyle negotiation"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"; the same section
OPTION_REPLY_MAGIC = 0x0003E889045565A9  # section "Fixed newstyle negotiation"
REQUEST_MAGIC = 0x25609513  # section "Request message"
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698  # section "Simple reply message"
STRUCTURED_REPLY_MAGIC = 0x668E33EF  # section "Structured reply chunk message"
EXTENDED_REPLY_MAGIC = 0x6E8A278C

STRING_LIMIT = 4096  # bytes of UTF-8 in any string; section "Conventions"
EXPORT_NAME_PADDING = 124  # zero bytes behind a reply to EXPORT_NAME; section "Newstyle negotiation"
EXTENT_LIMIT = 1 << 20  # descriptors in one status chunk; section "Request types", BLOCK_STATUS


class HandshakeFlag(IntFlag):
    """Sent by the server; section "Handshake flags"."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """Sent by the client; section "Client flags"."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do; section "Transmission flags"."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client asks while haggling; section "Option types". 4 is withdrawn (PEEK_EXPORT)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """What the server answers to an option; section "Option reply types"."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """Information about an export; section "Option types", INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """What a request asks; section "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How a request is to be done; section "Command flags"."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkFlag(IntFlag):
    """Section "Structured reply flags"."""

    DONE = 1 << 0


class Chunk(IntEnum):
    """Section "Structured reply types"."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class Error(IntEnum):
    """Section "Error values"."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ReplyStyle(IntEnum):
    """Which headers the transmission phase uses: what STRUCTURED_REPLY and EXTENDED_HEADERS settled."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class MetaContext(IntEnum):
    """The metadata contexts that we offer; the value is the id on the wire."""

    ALLOCATION = 1
    FOLD = 2

    @property
    def wire_name(self) -> str:
        """Namespace, colon, leaf: section "Metadata querying"."""
        return META_CONTEXT_NAMES[self]


META_CONTEXT_NAMES = {MetaContext.ALLOCATION: "base:allocation", MetaContext.FOLD: "nbdzram:fold"}


class FoldState(IntFlag):
    """Status bits of our own context nbdzram:fold. None set: an object that nobody else shares."""

    SHARED = 1 << 0  # several handles or block table entries point at its object
    HUGE = 1 << 1  # does not compress: stored raw
    SAME_FILLED = 1 << 2  # repeats one word: takes no object
    HOLE = 1 << 3  # not stored
