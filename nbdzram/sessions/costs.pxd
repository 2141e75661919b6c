# What requests take of a turn, and what one session may have under way.

from libc.stdint cimport int64_t, uint64_t

from nbdzram.nbd.transmission cimport BLOCK, BLOCK_STATUS, REPLY_OVERHEAD, TRIM, WRITE, WRITE_ZEROES, Request
from nbdzram.sessions.block_status cimport STATUS_WINDOW

cdef enum:
    INLINE_LIMIT = 64 << 10       # READ and WRITE up to here are done at once, in the inbox and the scratch
    INLINE_FREE = 1 << 20         # of TRIM and WRITE_ZEROES, what is charged as soon as it is taken
    TURN = 1 << 20                # of `cost`, in one turn, before others have theirs: some 250 microseconds
    COST_OF_STORING = 4           # a byte of a large WRITE takes as long as four of a READ
    EARLY = 16 << 10              # of a turn, and then what is answered is sent: a send takes a microsecond
    EARLY_NAPPING = 64 << 10      # the same behind a nap: such a client has enough to do meanwhile
    COST_OF_STATUS = 16 << 10     # and more with the range, once it is answered
    COST_OF_LOOK = TURN           # a step of looking for what an export's blocks share: asked for again and again
    COST_OF_REFUSAL = 16 << 10    # an error reply, its sentence and its notice
    STORE_LIMIT = 64              # large WRITEs and syncs of one session under way; what follows waits in its socket

cdef inline int64_t cost(const Request* request) noexcept nogil:
    """What a request takes of a turn, told in bytes of ordinary READs and WRITEs; steps of long ones are charged as
    they are taken."""
    cdef uint64_t length = request.length
    if request.command == BLOCK_STATUS:
        return COST_OF_STATUS
    if request.command == TRIM or request.command == WRITE_ZEROES:
        return BLOCK + (length // 8 if length <= INLINE_FREE else 0)
    if length == 0 or length > INLINE_LIMIT:
        return REPLY_OVERHEAD
    if request.command == WRITE and length < BLOCK:
        return 4 * BLOCK  # its block is decoded and encoded again
    return max(length, <uint64_t>BLOCK)

cdef inline int64_t cost_of_range(uint64_t length, int contexts) noexcept nogil:
    """What it takes of a turn to tell the status of so many bytes in so many contexts."""
    return min(length, <uint64_t>(STATUS_WINDOW // contexts)) * contexts // (STATUS_WINDOW // TURN)
