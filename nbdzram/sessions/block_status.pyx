"""BLOCK_STATUS: from the engine's extents to descriptors of the metadata contexts.

Section names are those of doc/proto.md (see nbd.constants).
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from nbdzram.engine.blocks cimport HOLE_BIT, HUGE_BIT, SAME_FILLED_BIT, SHARED_BIT, ZERO_BIT, Runs
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.twins cimport Twins
from nbdzram.nbd.transmission cimport EXTENDED, OK, REQ_ONE, WRONG_SHAPE, Request, load32, load64, put_status

cdef enum:  # nbd.constants.FoldState
    FOLD_SHARED = 1
    FOLD_HUGE = 2
    FOLD_SAME_FILLED = 4
    FOLD_HOLE = 8

cdef uint64_t _NARROW_LENGTH_LIMIT = (<uint64_t>1 << 32) - 4096  # what a 32-bit descriptor holds, in whole blocks


cdef int choose_contexts(
    const uint8_t* payload, size_t size, const Contexts* offered, Request* request, Contexts* chosen
) noexcept nogil:
    """The contexts and the effect length that a payload (PAYLOAD_LEN of extended headers) asks for. OK, or a
    verdict."""
    cdef uint32_t wanted
    cdef size_t at
    cdef int index
    cdef bint known
    chosen.count = 0
    if size < 12 or size % 4:
        return WRONG_SHAPE
    request.length = load64(payload)
    for at in range(8, size, 4):
        wanted = load32(payload + at)
        known = False
        for index in range(offered.count):
            known = known or offered.ids[index] == wanted
        for index in range(chosen.count):
            known = known and chosen.ids[index] != wanted
        if not known:
            return WRONG_SHAPE
        chosen.ids[chosen.count] = wanted
        chosen.count += 1
    return OK


cdef uint32_t _mask_of(uint32_t context) noexcept nogil:
    """The bits of an extent that a context speaks of."""
    if context == ALLOCATION:
        return HOLE_BIT | ZERO_BIT
    return HOLE_BIT | SHARED_BIT | HUGE_BIT | SAME_FILLED_BIT


cdef uint64_t _state_of(uint32_t context, uint64_t bits) noexcept nogil:
    """What a context says of an extent. Base:allocation's bits are the engine's own."""
    if context == ALLOCATION:
        return bits
    return ((FOLD_HOLE if bits & HOLE_BIT else 0) | (FOLD_SHARED if bits & SHARED_BIT else 0)
            | (FOLD_HUGE if bits & HUGE_BIT else 0) | (FOLD_SAME_FILLED if bits & SAME_FILLED_BIT else 0))


cdef size_t room_to_look(Disk disk, const Contexts* contexts) noexcept nogil:
    """How much memory one needs to look for what the export's blocks share, before put_statuses; 0: no need to look."""
    cdef size_t room = 0
    cdef int index
    for index in range(contexts.count):
        room = max(room, disk.room_for_twins(_mask_of(contexts.ids[index])))
    return room


cdef int _describe(
    Disk disk, const Request* request, uint32_t context, const Twins* twins, uint64_t holds, size_t limit, bint narrow,
    Runs* runs
) noexcept nogil:
    """Descriptors from the beginning of the range, as far as the limits allow: pairs of length in bytes and status.

    Neighbours differ in their status. `narrow`: lengths fit 32 bits. 0, or the engine's errno.
    """
    cdef uint32_t mask = _mask_of(context)
    cdef uint64_t at = request.offset
    cdef size_t index
    cdef int error
    runs.count = 0
    runs.limit = limit + 1  # with one that follows, the last is known to its end
    error = disk.c_extents(
        &at, request.offset + request.length, mask, holds, runs, twins if mask & SHARED_BIT else NULL)
    if error:
        return error
    runs.count = min(runs.count, limit)
    for index in range(runs.count):
        runs.pairs[2 * index + 1] = _state_of(context, runs.pairs[2 * index + 1])
        if narrow and runs.pairs[2 * index] > _NARROW_LENGTH_LIMIT:
            runs.pairs[2 * index] = _NARROW_LENGTH_LIMIT  # the client asks on from there
            runs.count = index + 1
            break
    return 0


cdef int put_statuses(
    uint8_t* target, Disk disk, const Request* request, int style, const Contexts* contexts, const Twins* twins,
    size_t limit, size_t* size
) noexcept nogil:
    """A reply of one chunk of at most `limit` descriptors a context, in up to STATUS_ROOM bytes. 0, or the engine's
    errno. `twins`: of the stretch where the range begins; NULL where there is no room_to_look."""
    cdef Runs runs
    cdef int index
    cdef int error = 0
    memset(&runs, 0, sizeof(Runs))
    size[0] = 0
    for index in range(contexts.count):
        error = _describe(
            disk, request, contexts.ids[index], twins, STATUS_HOLDS // contexts.count,
            1 if request.flags & REQ_ONE else limit, style != EXTENDED, &runs)
        if error == 0 and runs.count == 0:
            error = ENOMEM  # not even for a short list
        if error:
            break
        size[0] += put_status(
            target + size[0], request, style, contexts.ids[index], runs.pairs, runs.count, index == contexts.count - 1
        )
    free(runs.pairs)
    return error
