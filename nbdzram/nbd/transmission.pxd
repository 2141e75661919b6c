# The transmission phase on the wire: requests in, replies out. No I/O, no Python objects.
# Sections named are those of doc/proto.md (see constants.py).

from libc.errno cimport EDQUOT, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<endian.h>" nogil:
    uint16_t htobe16(uint16_t)
    uint32_t htobe32(uint32_t)
    uint64_t htobe64(uint64_t)
    uint16_t be16toh(uint16_t)
    uint32_t be32toh(uint32_t)
    uint64_t be64toh(uint64_t)

cdef enum:  # ReplyStyle
    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2

cdef enum:  # Command
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    COMMANDS = 8

cdef enum:  # CommandFlag
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32

cdef enum:  # Chunk, and the one flag of chunks
    CHUNK_NONE = 0
    CHUNK_DATA = 1
    CHUNK_HOLE = 2
    CHUNK_STATUS = 5
    CHUNK_STATUS_EXT = 6
    CHUNK_ERROR = 0x8001
    CHUNK_ERROR_OFFSET = 0x8002
    CHUNK_DONE = 1

cdef enum:  # Verdict (verdicts.py): what became of a request
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
    VERDICTS = 13

cdef inline int verdict_of(int error) noexcept nogil:
    # What the engine's errno means for a request: of these two, room that trimming, or a higher limit, would make.
    if error == 0:
        return OK
    return POOL_FULL if error == ENOSPC else OVER_QUOTA if error == EDQUOT else UNREADABLE

cdef enum:
    REQUEST_SIZE = 28            # bytes of a compact request header
    EXTENDED_REQUEST_SIZE = 32
    SIMPLE_REPLY_SIZE = 16
    CHUNK_SIZE = 20              # bytes of a structured chunk header
    EXTENDED_CHUNK_SIZE = 32
    REPLY_OVERHEAD = 64          # more than any header with the fixed part of its payload
    BLOCK = 4096                 # runs of zeroes are reported in these steps
    NOT_AN_OFFSET = -1           # of a failure that no offset is known of, or may be told of

ctypedef struct Request:
    uint64_t cookie              # as it lay on the wire: opaque
    uint64_t offset
    uint64_t length              # effect length; of WRITE also the payload's
    uint64_t payload             # bytes that follow the header
    uint16_t flags
    uint16_t command

ctypedef struct Rules:           # what validation needs to know of a connection
    uint64_t size                # of the export, bytes
    uint64_t payload_limit       # largest READ or WRITE, bytes
    uint64_t unfragmented_limit  # largest READ with DF, bytes; at least 64 KiB
    int style
    int context_count
    bint read_only


cdef inline uint16_t load16(const uint8_t* source) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, source, 2)
    return be16toh(value)

cdef inline uint32_t load32(const uint8_t* source) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, source, 4)
    return be32toh(value)

cdef inline uint64_t load64(const uint8_t* source) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, source, 8)
    return be64toh(value)

cdef inline void store16(uint8_t* target, uint16_t value) noexcept nogil:
    value = htobe16(value)
    memcpy(target, &value, 2)

cdef inline void store32(uint8_t* target, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(target, &value, 4)

cdef inline void store64(uint8_t* target, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(target, &value, 8)


cdef inline int parse_request(const uint8_t* source, size_t available, int style, Request* request) noexcept nogil:
    # Section "Request message". The header's size; 0: more bytes are needed; -1: bad magic.
    cdef size_t size = EXTENDED_REQUEST_SIZE if style == EXTENDED else REQUEST_SIZE
    if available < size:
        return 0
    if load32(source) != (<uint32_t>0x21E41C71 if style == EXTENDED else <uint32_t>0x25609513):
        return -1
    request.flags = load16(source + 4)
    request.command = load16(source + 6)
    memcpy(&request.cookie, source + 8, 8)
    request.offset = load64(source + 16)
    if style == EXTENDED:
        request.length = load64(source + 24)
        # A WRITE must carry PAYLOAD_LEN, but QEMU 10 sends it without, payload and all.
        request.payload = request.length if request.flags & PAYLOAD_LEN or request.command == WRITE else 0
    else:
        request.length = load32(source + 24)
        request.payload = request.length if request.command == WRITE else 0
    return <int>size


cdef int validate(const Request* request, const Rules* rules) noexcept nogil

cdef inline size_t chunk_size(int style) noexcept nogil:
    return EXTENDED_CHUNK_SIZE if style == EXTENDED else CHUNK_SIZE

cdef inline uint8_t* put_chunk(
    uint8_t* target, int style, uint64_t cookie, uint64_t request_offset, int flags, int kind, uint64_t payload
) noexcept nogil:
    # A chunk's header (sections "Structured reply chunk message", "Extended reply chunk message"); where its payload
    # begins.
    store16(target + 4, <uint16_t>flags)
    store16(target + 6, <uint16_t>kind)
    memcpy(target + 8, &cookie, 8)
    if style == EXTENDED:
        store32(target, 0x6E8A278C)
        store64(target + 16, request_offset)
        store64(target + 24, payload)
        return target + EXTENDED_CHUNK_SIZE
    store32(target, 0x668E33EF)
    store32(target + 16, <uint32_t>payload)
    return target + CHUNK_SIZE

cdef inline uint8_t* put_simple(uint8_t* target, uint64_t cookie, int error) noexcept nogil:
    # Section "Simple reply message".
    store32(target, 0x67446698)
    store32(target + 4, <uint32_t>error)
    memcpy(target + 8, &cookie, 8)
    return target + SIMPLE_REPLY_SIZE

cdef inline uint8_t* put_success(uint8_t* target, int style, const Request* request) noexcept nogil:
    # A reply without payload; where it ends.
    if style == SIMPLE:
        return put_simple(target, request.cookie, 0)
    return put_chunk(target, style, request.cookie, request.offset, CHUNK_DONE, CHUNK_NONE, 0)

cdef inline size_t read_header_size(int style) noexcept nogil:
    # Bytes in front of the data of one READ reply.
    return SIMPLE_REPLY_SIZE if style == SIMPLE else chunk_size(style) + 8

cdef size_t finish_read(
    uint8_t* target, int style, const Request* request, uint64_t offset, uint64_t length, bint whole, bint done
) noexcept nogil

cdef size_t put_status(
    uint8_t* target, const Request* request, int style, uint32_t context, const uint64_t* extents, size_t count,
    bint done
) noexcept nogil
cdef size_t put_error(
    uint8_t* target, const Request* request, int style, int error, const char* text, size_t length, int64_t failed_at
) noexcept nogil
