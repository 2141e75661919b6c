# Which objects several blocks of one stretch of an export hold: what a client may be told of sharing. That others hold
# an object too is not for it to know, and must not show, neither way: so holders are counted among the export's own
# blocks, and the count of all holders is only a hint that there is something to look for.
#
# A set of handles, open addressing: each stands for one block that was seen, or several.

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef enum:
    STRETCH_BLOCKS = 1 << 16  # 256 MiB of an export: some milliseconds to look through, where all of it is stored
    SEVERAL = 1               # in a place of the set, beside the handle, which stands one bit higher

cdef struct Twins:
    uint64_t* places
    uint64_t capacity   # a power of two, at least twice what is used; 0: nothing was seen, or there is no memory
    uint64_t used
    uint64_t stretch    # that was looked through, counted from 1; 0: none yet

cdef inline uint64_t* twins_place(const Twins* twins, uint32_t handle) noexcept nogil:
    """Where a handle stands, or would."""
    cdef uint64_t place = (handle * <uint64_t>0x9E3779B97F4A7C15) >> 32 & (twins.capacity - 1)
    while twins.places[place] and twins.places[place] >> 1 != handle:
        place = (place + 1) & (twins.capacity - 1)
    return twins.places + place

cdef inline bint twins_grow(Twins* twins) noexcept nogil:
    cdef Twins grown
    cdef uint64_t index
    grown.capacity = max(<uint64_t>256, twins.capacity * 2)
    grown.places = <uint64_t*>calloc(grown.capacity, sizeof(uint64_t))
    if grown.places == NULL:
        return False
    for index in range(twins.capacity):
        if twins.places[index]:
            twins_place(&grown, <uint32_t>(twins.places[index] >> 1))[0] = twins.places[index]
    free(twins.places)
    twins.places = grown.places
    twins.capacity = grown.capacity
    return True

cdef inline void twins_make_room(Twins* twins, uint32_t count) noexcept nogil:
    """For so many more, without the pool's lock: to grow takes memory, and a look at all that there is."""
    while (twins.used + count) * 2 > twins.capacity and twins_grow(twins):
        pass

cdef inline void twins_add(Twins* twins, uint32_t handle) noexcept nogil:
    """One block more that holds an object. Without memory it is not seen, and its sharing not told."""
    cdef uint64_t* place
    if (twins.used + 1) * 2 > twins.capacity:
        return
    place = twins_place(twins, handle)
    twins.used += place[0] == 0
    place[0] = <uint64_t>handle << 1 | (SEVERAL if place[0] else 0)

cdef inline bint twins_has(const Twins* twins, uint32_t handle) noexcept nogil:
    """Whether several blocks hold an object."""
    return twins.capacity != 0 and twins_place(twins, handle)[0] & SEVERAL

cdef inline void twins_forget(Twins* twins) noexcept nogil:
    free(twins.places)
    twins.places = NULL
    twins.capacity = twins.used = 0
