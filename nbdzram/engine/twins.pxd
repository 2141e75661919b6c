# Which objects several blocks of one stretch of an export hold: what a client may be told of sharing. That others hold
# an object too is not for it to know, and must not show, neither way: so holders are counted among the export's own
# blocks, and the count of all holders is only a hint that there is something to look for.
#
# A set of handles, open addressing: each stands for one block that was seen, or several. To look through a stretch
# takes milliseconds, so who has others to serve does it in steps (extents.look_for_twins). The memory is the caller's,
# and goes by how much the export stores: how long it takes tells nothing of others.

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

cdef enum:
    STRETCH_BLOCKS = 1 << 16  # 256 MiB of an export
    SEVERAL = 1               # in a place of the set, beside the handle, which stands one bit higher

cdef struct Twins:
    uint64_t* places
    uint64_t capacity   # a power of two, at least twice what is used; 0: there is no memory, and no sharing is told
    uint64_t used
    uint64_t until      # where the first block that is stored is sought, which is in the stretch
    uint64_t first      # of the stretch, in blocks; 0 with the end, until it is found
    uint64_t end
    uint64_t next       # the block from which it is not looked through yet

cdef inline size_t twins_bytes(uint64_t blocks) noexcept nogil:
    """The memory that a stretch takes of an export where so many blocks are stored."""
    cdef size_t capacity = 256
    while capacity < 2 * min(blocks, <uint64_t>STRETCH_BLOCKS):
        capacity *= 2
    return capacity * sizeof(uint64_t)

cdef inline void twins_end(Twins* twins) noexcept nogil:
    """There is nothing to look for, in any stretch."""
    twins.first = 0
    twins.next = twins.end = <uint64_t>-1

cdef inline void twins_begin(Twins* twins, uint64_t block, uint64_t until, void* memory, size_t size) noexcept nogil:
    """Of the stretch of the first block that is stored from `block` to before `until`, in `size` bytes of memory (see
    twins_bytes), or in none."""
    if size:
        memset(memory, 0, size)
    twins.places = <uint64_t*>memory
    twins.capacity = size // sizeof(uint64_t)
    twins.used = 0
    twins.next, twins.until = block, until
    twins.first = twins.end = 0
    if size == 0:
        twins_end(twins)

cdef inline void twins_found(Twins* twins, uint64_t block) noexcept nogil:
    """A block is stored: its stretch is looked through."""
    twins.first = twins.next = block // STRETCH_BLOCKS * STRETCH_BLOCKS
    twins.end = twins.first + STRETCH_BLOCKS

cdef inline bint twins_know(const Twins* twins, uint64_t block) noexcept nogil:
    """Is a block in the stretch that was looked through?"""
    return twins.next == twins.end and twins.first <= block < twins.end

cdef inline uint64_t* twins_place(const Twins* twins, uint32_t handle) noexcept nogil:
    """Where a handle stands, or would."""
    cdef uint64_t place = (handle * <uint64_t>0x9E3779B97F4A7C15) >> 32 & (twins.capacity - 1)
    while twins.places[place] and twins.places[place] >> 1 != handle:
        place = (place + 1) & (twins.capacity - 1)
    return twins.places + place

cdef inline void twins_add(Twins* twins, uint32_t handle) noexcept nogil:
    """One block more that holds an object. What is stored meanwhile and finds no place is not seen."""
    cdef uint64_t* place
    if (twins.used + 1) * 2 > twins.capacity:
        return
    place = twins_place(twins, handle)
    twins.used += place[0] == 0
    place[0] = <uint64_t>handle << 1 | (SEVERAL if place[0] else 0)

cdef inline bint twins_has(const Twins* twins, uint32_t handle) noexcept nogil:
    """Whether several blocks hold an object."""
    return twins.capacity != 0 and twins_place(twins, handle)[0] & SEVERAL
