from libc.stdint cimport uint8_t, uint64_t

from nbdzram.engine.blocks cimport Blocks

cdef int read_range(Blocks disk, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil
cdef int read_block(Blocks disk, uint64_t block, uint8_t* target) noexcept nogil
