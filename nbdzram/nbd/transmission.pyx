"""The transmission phase on the wire, without I/O: judge requests, build replies.

The inline half (parsing, headers) is in transmission.pxd, so that the server's hot path compiles it in. Here are what
is too large to inline, and a small Python face for what is rare enough to be built from Python.

Section names are those of doc/proto.md (see constants).
"""

from array import array

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize


cdef int flags_of(int command, int style) noexcept nogil:
    """The command flags that may stand on a command (section "Command flags"); -1: no such command."""
    cdef int payload = PAYLOAD_LEN if style == EXTENDED else 0
    if command == READ:
        return FUA | (DF if style != SIMPLE else 0)
    if command == WRITE:
        return FUA | payload
    if command == WRITE_ZEROES:
        return FUA | NO_HOLE | FAST_ZERO
    if command == BLOCK_STATUS:
        return FUA | REQ_ONE | payload
    if command == DISC or command == FLUSH or command == TRIM or command == CACHE:
        return FUA
    return -1


cdef int validate(const Request* request, const Rules* rules) noexcept nogil:
    """Everything that can be said against a request before it is performed. OK, or the verdict."""
    cdef int allowed = flags_of(request.command, rules.style)
    if request.command == DISC:
        return OK  # whatever else it says: there is no reply to it, so there is no error either
    if allowed < 0:
        return UNKNOWN_COMMAND
    if request.flags & ~allowed:
        return WRONG_FLAGS
    if rules.read_only and (request.command == WRITE or request.command == TRIM or request.command == WRITE_ZEROES):
        return READ_ONLY
    if request.command == FLUSH:
        return OK if request.offset == 0 and request.length == 0 else WRONG_SHAPE
    if request.command == BLOCK_STATUS:
        if rules.context_count == 0:
            return NO_CONTEXT
        if request.flags & PAYLOAD_LEN:
            return OK  # its effect length is in the payload; judged when that has come
        if request.length == 0:
            return WRONG_SHAPE  # a status descriptor may not be empty
    if request.offset > rules.size or request.length > rules.size - request.offset:
        return OUT_OF_RANGE
    if request.command == READ and request.length > rules.payload_limit:
        return TOO_LONG
    if request.command == READ and request.flags & DF and request.length > rules.unfragmented_limit:
        return FRAGMENTED
    return OK


cdef enum:
    SMALLEST_HOLE = 512  # bytes; also what the protocol asks chunks to be a multiple of, where possible


cdef inline bint is_zero(const uint8_t* source, size_t length) noexcept nogil:
    """All bytes zero. Content that is not shows it in its first word almost always, so this costs nothing there."""
    cdef uint64_t word = 0
    if length < 8:
        return memcmp(source, &word, length) == 0
    if memcmp(source, &word, 8) != 0:
        return False
    return memcmp(source, source + 8, length - 8) == 0


cdef inline size_t run_length(const uint8_t* source, uint64_t offset, uint64_t length, bint* zero) noexcept nogil:
    """The longest run of blocks at `source` (export offset `offset`) that are all zero, or all not.

    A small part of a block at either end counts as not zero: a hole's header must fit where its data lay.
    """
    cdef uint64_t position = 0
    cdef uint64_t step
    cdef bint kind
    while position < length:
        step = BLOCK - (offset + position) % BLOCK
        if step > length - position:
            step = length - position
        kind = step >= SMALLEST_HOLE and is_zero(source + position, step)
        if position == 0:
            zero[0] = kind
        elif kind != zero[0]:
            break
        position += step
    return position


cdef size_t finish_read(
    uint8_t* target, int style, const Request* request, uint64_t offset, uint64_t length, bint whole, bint done
) noexcept nogil:
    """Make a reply of `length` data bytes that lie at target + read_header_size(style); the reply's size.

    Zero blocks leave as OFFSET_HOLE, whose header takes the place of their data: the reply never grows. With `whole`
    (DF, or a simple reply) there is one content chunk. `done`: no other part of the reply follows.
    """
    cdef size_t header = read_header_size(style)
    cdef uint8_t* source = target + header
    cdef uint8_t* end = source + length
    cdef uint8_t* write = target
    cdef uint8_t* body
    cdef size_t run
    cdef bint zero = False
    cdef int flags = 0
    if style == SIMPLE:
        put_simple(target, request.cookie, 0)
        return header + length
    while source < end:
        run = run_length(source, offset, <uint64_t>(end - source), &zero)
        if whole and run < length:
            run = length
            zero = False
        if done and source + run == end:
            flags = CHUNK_DONE
        if zero:
            body = put_chunk(write, style, request.cookie, request.offset, flags, CHUNK_HOLE, 12)
            store64(body, offset)
            store32(body + 8, <uint32_t>run)
            write = body + 12
        else:
            body = write + chunk_size(style)
            memmove(body + 8, source, run)
            put_chunk(write, style, request.cookie, request.offset, flags, CHUNK_DATA, 8 + run)
            store64(body, offset)
            write = body + 8 + run
        source += run
        offset += run
    return <size_t>(write - target)


cdef size_t put_status(
    uint8_t* target, const Request* request, int style, uint32_t context, const uint64_t* extents, size_t count,
    bint done
) noexcept nogil:
    """One BLOCK_STATUS chunk of `count` extents, pairs of length in bytes and status bits, none empty; its size.

    With extended headers it is BLOCK_STATUS_EXT, which holds 64-bit lengths. Lengths are below 2**32 otherwise.
    """
    cdef bint wide = style == EXTENDED
    cdef uint8_t* start = target
    cdef size_t index
    target = put_chunk(
        target, style, request.cookie, request.offset, CHUNK_DONE if done else 0,
        CHUNK_STATUS_EXT if wide else CHUNK_STATUS, 8 + 16 * count if wide else 4 + 8 * count,
    )
    store32(target, context)
    target += 4
    if wide:
        store32(target, <uint32_t>count)
        target += 4
    for index in range(count):
        if wide:
            store64(target, extents[2 * index])
            store64(target + 8, extents[2 * index + 1])
            target += 16
        else:
            store32(target, <uint32_t>extents[2 * index])
            store32(target + 4, <uint32_t>extents[2 * index + 1])
            target += 8
    return target - start


cdef size_t put_error(
    uint8_t* target, const Request* request, int style, int error, const char* text, size_t length, int64_t failed_at
) noexcept nogil:
    """An error reply with its explanation (none in a simple reply). `failed_at`: where it failed, or NOT_AN_OFFSET; its
    size."""
    cdef uint8_t* start = target
    cdef bint located = failed_at != NOT_AN_OFFSET
    if style == SIMPLE:
        return put_simple(target, request.cookie, error) - target
    target = put_chunk(
        target, style, request.cookie, request.offset, CHUNK_DONE, CHUNK_ERROR_OFFSET if located else CHUNK_ERROR,
        6 + length + (8 if located else 0),
    )
    store32(target, error)
    store16(target + 4, <uint16_t>length)
    memcpy(target + 6, text, length)
    target += 6 + length
    if located:
        store64(target, failed_at)
        target += 8
    return target - start


cdef Request _asked(bytes cookie, uint64_t offset):
    """What a reply repeats of its request."""
    cdef Request request
    assert len(cookie) == 8
    memcpy(&request.cookie, PyBytes_AS_STRING(cookie), 8)
    request.offset = offset
    return request


def status_chunk(
    int style, bytes cookie not None, uint64_t request_offset, int context, list extents not None, bint done
):
    """See put_status."""
    cdef Request request = _asked(cookie, request_offset)
    cdef bytearray reply = bytearray(EXTENDED_CHUNK_SIZE + 8 + 16 * len(extents))
    cdef uint8_t[::1] target = reply
    cdef uint64_t[::1] pairs = array("Q", [number for extent in extents for number in extent])
    assert style != SIMPLE and extents
    return bytes(reply[: put_status(&target[0], &request, style, context, &pairs[0], len(extents), done)])


def error_reply(
    int style, bytes cookie not None, uint64_t request_offset, int error, bytes text not None, failed_at=None
):
    """See put_error."""
    cdef Request request = _asked(cookie, request_offset)
    cdef bytearray reply = bytearray(REPLY_OVERHEAD + len(text))
    cdef uint8_t[::1] target = reply
    cdef int64_t at = NOT_AN_OFFSET if failed_at is None else failed_at
    assert error
    return bytes(reply[: put_error(&target[0], &request, style, error, PyBytes_AS_STRING(text), len(text), at)])


def request_at(const uint8_t[::1] source, int style):
    """Parse one request header: (size of the header, flags, command, cookie, offset, length, payload bytes behind it).

    None when `source` is too short. Raises ValueError for a bad magic.
    """
    cdef Request request
    cdef const uint8_t* start = &source[0] if source.shape[0] else NULL
    cdef int size = parse_request(start, source.shape[0], style, &request)
    if size == 0:
        return None
    if size < 0:
        raise ValueError("bad request magic")
    cookie = PyBytes_FromStringAndSize(<char*>&request.cookie, 8)
    return size, request.flags, request.command, cookie, request.offset, request.length, request.payload


def verdict_on(request, *, uint64_t size, int style, bint read_only=False, int context_count=0,
               uint64_t payload_limit=64 << 20, uint64_t unfragmented_limit=256 << 10):
    """Judge what request_at returned. A Verdict's number."""
    cdef Request parsed
    cdef Rules rules
    _, parsed.flags, parsed.command, cookie, parsed.offset, parsed.length, parsed.payload = request
    memcpy(&parsed.cookie, PyBytes_AS_STRING(cookie), 8)
    rules.size = size
    rules.style = style
    rules.read_only = read_only
    rules.context_count = context_count
    rules.payload_limit = payload_limit
    rules.unfragmented_limit = unfragmented_limit
    return validate(&parsed, &rules)


def read_reply(int style, bytes cookie not None, uint64_t request_offset, uint64_t offset, bytes content not None, *,
               bint whole=False, bint done=True):
    """A READ reply with `content` from `offset`, as the hot path builds it."""
    cdef Request request = _asked(cookie, request_offset)
    cdef bytearray reply = bytearray(read_header_size(style)) + content
    cdef uint8_t[::1] view = reply
    return bytes(view[: finish_read(&view[0], style, &request, offset, len(content), whole, done)])
