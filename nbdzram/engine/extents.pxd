from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.twins cimport Twins

cdef struct Runs:
    # Adjacent blocks of one kind, joined: pairs of length in bytes and bits (blocks.pxd).
    uint64_t* pairs
    size_t count
    size_t room
    size_t limit

cdef size_t room_for_twins(Blocks disk, uint32_t mask) noexcept nogil
cdef bint look_for_twins(Blocks disk, Twins* twins, uint32_t looks) noexcept nogil
cdef int find_extents(
    Blocks disk, uint64_t* at, uint64_t end, uint32_t mask, uint64_t looks, Runs* runs, const Twins* twins
) noexcept nogil
cdef list list_extents(Blocks disk, uint64_t offset, uint64_t length, size_t limit, uint32_t mask)
