"""What a refused request is told: the error on the wire, and one sentence that explains it.

In C, because a thread that serves clients never waits for the interpreter; verdicts.py shows both to Python, so that
the client's error text and the log say the same.
"""

from libc.errno cimport EINVAL, EIO, ENOSPC, EOVERFLOW, EPERM
from libc.stdint cimport uint64_t
from libc.string cimport strlen

from nbdzram.nbd.transmission cimport (
    BLOCK_STATUS, CACHE, COMMANDS, DISC, FLUSH, FRAGMENTED, NOT_SYNCED, NO_CONTEXT, OUT_OF_RANGE, OVER_QUOTA, POOL_FULL,
    READ, READ_ONLY, TOO_LONG, TRIM, UNKNOWN_COMMAND, UNREADABLE, VERDICTS, WRITE, WRITE_ZEROES, WRONG_FLAGS,
    WRONG_SHAPE, Request,
)

cdef extern from "<stdio.h>" nogil:
    int snprintf(char*, size_t, const char*, ...)

cdef enum:
    NAME_SIZE = 24                # of a command: "command 65535"
    FLAGS_SIZE = 64               # all six by name, and the rest as a number

ctypedef const char* Word

cdef Word[6] _FLAG_NAMES = [b"FUA", b"NO_HOLE", b"DF", b"REQ_ONE", b"FAST_ZERO", b"PAYLOAD_LEN"]
cdef Word[COMMANDS] _COMMAND_NAMES
_COMMAND_NAMES[READ] = b"READ"
_COMMAND_NAMES[WRITE] = b"WRITE"
_COMMAND_NAMES[DISC] = b"DISC"
_COMMAND_NAMES[FLUSH] = b"FLUSH"
_COMMAND_NAMES[TRIM] = b"TRIM"
_COMMAND_NAMES[CACHE] = b"CACHE"
_COMMAND_NAMES[WRITE_ZEROES] = b"WRITE_ZEROES"
_COMMAND_NAMES[BLOCK_STATUS] = b"BLOCK_STATUS"

cdef int[VERDICTS] _ERRORS  # section "Error values"
_ERRORS[UNKNOWN_COMMAND] = EINVAL
_ERRORS[WRONG_FLAGS] = EINVAL
_ERRORS[READ_ONLY] = EPERM
_ERRORS[OUT_OF_RANGE] = EINVAL
_ERRORS[TOO_LONG] = EINVAL
_ERRORS[FRAGMENTED] = EOVERFLOW
_ERRORS[NO_CONTEXT] = EINVAL
_ERRORS[WRONG_SHAPE] = EINVAL
_ERRORS[POOL_FULL] = ENOSPC
_ERRORS[UNREADABLE] = EIO
_ERRORS[NOT_SYNCED] = EIO
_ERRORS[OVER_QUOTA] = ENOSPC


cdef int error_of(int verdict, int command) noexcept nogil:
    """The value on the wire. Past the end, what would store gets ENOSPC."""
    if verdict == OUT_OF_RANGE and (command == WRITE or command == WRITE_ZEROES):
        return ENOSPC
    return _ERRORS[verdict]


cdef void _name_command(char* target, int command) noexcept nogil:
    if 0 <= command < COMMANDS:
        snprintf(target, NAME_SIZE, b"%s", _COMMAND_NAMES[command])
    else:
        snprintf(target, NAME_SIZE, b"command %d", command)


cdef void _name_flags(char* target, unsigned int flags) noexcept nogil:
    """FUA|DF...; unknown bits as a number."""
    cdef size_t used = 0
    cdef int bit
    for bit in range(6):
        if flags >> bit & 1:
            used += snprintf(target + used, FLAGS_SIZE - used, b"%s%s", b"|" if used else b"", _FLAG_NAMES[bit])
    if flags >> 6 or flags == 0:
        snprintf(target + used, FLAGS_SIZE - used, b"%s%#x", b"|" if used else b"", flags >> 6 << 6)


cdef size_t put_sentence(
    char* target, int verdict, const Request* request, uint64_t size, uint64_t limit
) noexcept nogil:
    """One sentence, of at most SENTENCE_SIZE bytes with its final zero: what, the value, the limit; its length.

    `size` is the export's; `limit` the payload limit, or for FRAGMENTED that of unfragmented reads. Bytes.
    """
    cdef char name[NAME_SIZE]
    cdef char what[NAME_SIZE + 64]
    cdef char flags[FLAGS_SIZE]
    cdef unsigned long long export = size, most = limit
    _name_command(name, request.command)
    snprintf(
        what, sizeof(what), b"%s of %llu bytes at %llu", name,
        <unsigned long long>request.length, <unsigned long long>request.offset,
    )
    if verdict == UNKNOWN_COMMAND:
        snprintf(target, SENTENCE_SIZE, b"command %d is not known", <int>request.command)
    elif verdict == WRONG_FLAGS:
        _name_flags(flags, request.flags)
        snprintf(
            target, SENTENCE_SIZE, b"%s with flags %#x (%s) is not allowed here", name,
            <unsigned int>request.flags, flags
        )
    elif verdict == READ_ONLY:
        snprintf(target, SENTENCE_SIZE, b"%s: the export is read-only", what)
    elif verdict == OUT_OF_RANGE:
        snprintf(target, SENTENCE_SIZE, b"%s goes past the end of the export (%llu bytes)", what, export)
    elif verdict == TOO_LONG:
        snprintf(target, SENTENCE_SIZE, b"%s: at most %llu bytes a request are served", what, most)
    elif verdict == FRAGMENTED:
        snprintf(target, SENTENCE_SIZE, b"%s with DF: at most %llu bytes are sent unfragmented", what, most)
    elif verdict == NO_CONTEXT:
        snprintf(target, SENTENCE_SIZE, b"%s: SET_META_CONTEXT selected no metadata context for this export", what)
    elif verdict == WRONG_SHAPE:
        snprintf(target, SENTENCE_SIZE, b"%s is not a valid form of this request", what)
    elif verdict == POOL_FULL:
        snprintf(target, SENTENCE_SIZE, b"%s: the pool is at its memory limit", what)
    elif verdict == OVER_QUOTA:
        snprintf(target, SENTENCE_SIZE, b"%s: the export stores as much as its quota allows", what)
    elif verdict == UNREADABLE:
        snprintf(target, SENTENCE_SIZE, b"%s: stored bytes do not decode", what)
    elif verdict == NOT_SYNCED:
        snprintf(
            target, SENTENCE_SIZE, b"%s: the disk below the state directory did not take what was stored", what
        )
    else:
        snprintf(target, SENTENCE_SIZE, b"%s succeeded", what)
    return strlen(target)


def sentence(int verdict, int command, int flags, uint64_t offset, uint64_t length, *, uint64_t size, uint64_t limit):
    """The sentence for a request, as its client gets it."""
    cdef Request request
    cdef char text[SENTENCE_SIZE]
    request.command, request.flags, request.offset, request.length = command, flags, offset, length
    put_sentence(text, verdict, &request, size, limit)
    return text.decode()


def wire_error(int verdict, int command):
    """The error value on the wire."""
    return error_of(verdict, command)
