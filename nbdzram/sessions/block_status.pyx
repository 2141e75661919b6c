"""BLOCK_STATUS: from the engine's extents to descriptors of the metadata contexts.

Section names are those of doc/proto.md (see nbd.constants).
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from nbdzram.engine.blocks cimport HOLE_BIT, HUGE_BIT, SAME_FILLED_BIT, SHARED_BIT, ZERO_BIT
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.extents cimport Runs, find_extents, room_for_twins
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


cdef uint32_t _mask_of(Disk disk, uint32_t context) noexcept nogil:
    """The bits of an extent that a context speaks of. A raw block that folds into an equal one which was recompressed
    is raw no more: its client would learn that somebody else has it."""
    if context == ALLOCATION:
        return HOLE_BIT | ZERO_BIT
    return HOLE_BIT | SHARED_BIT | SAME_FILLED_BIT | (HUGE_BIT if disk.pool.tells_sharing else 0)


cdef uint64_t _state_of(uint32_t context, uint64_t bits) noexcept nogil:
    """What a context says of an extent. Base:allocation's bits are the engine's own."""
    if context == ALLOCATION:
        return bits
    return ((FOLD_HOLE if bits & HOLE_BIT else 0) | (FOLD_SHARED if bits & SHARED_BIT else 0)
            | (FOLD_HUGE if bits & HUGE_BIT else 0) | (FOLD_SAME_FILLED if bits & SAME_FILLED_BIT else 0))


cdef size_t room_to_look(Disk disk, const Contexts* contexts) noexcept nogil:
    """How much memory one needs to look for what the export's blocks share, before telling; 0: no need to look."""
    cdef size_t room = 0
    cdef int index
    for index in range(contexts.count):
        room = max(room, room_for_twins(disk, _mask_of(disk, contexts.ids[index])))
    return room


cdef void begin_telling(Telling* telling, const Request* request, size_t limit) noexcept nogil:
    """Nothing is gathered yet of a reply of at most `limit` descriptors a context. forget_telling ends it."""
    memset(telling, 0, sizeof(Telling))
    telling.limit = 1 if request.flags & REQ_ONE else limit
    telling.at = request.offset


cdef void forget_telling(Telling* telling) noexcept nogil:
    """Let go what was gathered."""
    cdef int index
    for index in range(CONTEXTS):
        free(telling.runs[index].pairs)
        telling.runs[index].pairs = NULL


cdef int tell_on(
    Disk disk, const Request* request, const Contexts* contexts, const Twins* twins, uint64_t holds, Telling* telling
) noexcept nogil:
    """Gather on, in the context that is not told yet, in so many `holds` (looks, beside writers). 0, or the engine's
    errno.

    `twins`: of the stretch where the first block of the range lies that is stored; NULL where there is no room_to_look.
    """
    cdef uint32_t mask = _mask_of(disk, contexts.ids[telling.told])
    cdef Runs* runs = &telling.runs[telling.told]
    cdef uint64_t before = telling.at
    cdef uint64_t end = request.offset + request.length
    cdef int error
    runs.limit = telling.limit  # the last goes on until another one follows
    error = find_extents(disk, &telling.at, end, mask, holds, runs, twins)
    if error == 0 and (telling.at >= end or telling.at == before):
        tell_next(telling, request)
    return error


cdef void tell_next(Telling* telling, const Request* request) noexcept nogil:
    """What was gathered in a context is enough: the next one is told from the beginning."""
    telling.told += 1
    telling.at = request.offset


cdef int put_statuses(
    uint8_t* target, const Request* request, int style, const Contexts* contexts, Telling* telling, size_t* size
) noexcept nogil:
    """The reply of what was gathered, in up to STATUS_ROOM bytes: a chunk for each context. 0, or the engine's errno.

    Neighbours differ in their status. Where lengths have 32 bits, the list ends with the one that has more.
    """
    cdef Runs* runs
    cdef int index
    cdef size_t at
    size[0] = 0
    for index in range(contexts.count):
        runs = &telling.runs[index]
        if runs.count == 0:
            return ENOMEM  # not even for a short list
        for at in range(runs.count):
            runs.pairs[2 * at + 1] = _state_of(contexts.ids[index], runs.pairs[2 * at + 1])
            if style != EXTENDED and runs.pairs[2 * at] > _NARROW_LENGTH_LIMIT:
                runs.pairs[2 * at] = _NARROW_LENGTH_LIMIT  # the client asks on from there
                runs.count = at + 1
                break
        size[0] += put_status(
            target + size[0], request, style, contexts.ids[index], runs.pairs, runs.count, index == contexts.count - 1
        )
    return 0
