from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.disk cimport Disk
from nbdzram.engine.extents cimport Runs
from nbdzram.engine.twins cimport Twins
from nbdzram.nbd.transmission cimport Request

cdef enum:
    CONTEXTS = 2                  # that there are: MetaContext
    ALLOCATION = 1
    FOLD = 2
    STATUS_PAYLOAD_LIMIT = 4096   # bytes of a BLOCK_STATUS payload: an effect length and context ids
    DESCRIPTORS = 512             # in one chunk: 8 KiB of reply at most; a server may stop early, and a client asks on
    STRAINED_DESCRIPTORS = 128    # the same while the memory for replies is used up
    STATUS_ROOM = CONTEXTS * (64 + 16 * DESCRIPTORS)  # bytes of a reply
    # Looks at the table for all contexts together where a request is told at once: 16 MiB of an export where blocks are
    # stored, 80 to 100 microseconds. Holes are passed over by whole tables.
    STATUS_HOLDS = 64
    STATUS_WINDOW = STATUS_HOLDS * 64 * 4096

cdef struct Contexts:
    # What SET_META_CONTEXT selected, or a request's payload.
    uint32_t ids[CONTEXTS]
    int count

cdef struct Telling:
    # What a request will be told, as far as it was gathered: a list for each of its contexts, in their order.
    Runs runs[CONTEXTS]
    size_t limit   # descriptors of a context
    int told       # contexts that are told
    uint64_t at    # in the range, of the next context

cdef int choose_contexts(
    const uint8_t* payload, size_t size, const Contexts* offered, Request* request, Contexts* chosen
) noexcept nogil
cdef size_t room_to_look(Disk disk, const Contexts* contexts) noexcept nogil
cdef void begin_telling(Telling* telling, const Request* request, size_t limit) noexcept nogil
cdef void forget_telling(Telling* telling) noexcept nogil
cdef int tell_on(
    Disk disk, const Request* request, const Contexts* contexts, const Twins* twins, uint64_t holds, Telling* telling
) noexcept nogil
cdef void tell_next(Telling* telling, const Request* request) noexcept nogil
cdef int put_statuses(
    uint8_t* target, const Request* request, int style, const Contexts* contexts, Telling* telling, size_t* size
) noexcept nogil
