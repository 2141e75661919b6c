from libc.stdint cimport uint64_t

from nbdzram.engine.blocks cimport Blocks

cdef enum:
    ANYWHERE = 0  # of where a write ends: it is none by a client, and may lie behind the export's end

cdef uint64_t* own_leaf(Blocks disk, uint64_t block, uint64_t end, bint making_room, int* error) noexcept nogil
cdef bint drop_shared_leaf(Blocks disk, uint64_t first) noexcept nogil
