from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.core cimport PoolCore

cdef enum:
    FORESEEN = 32  # blocks at a time: more than a processor fetches at once, few enough to stay in its caches

cdef struct Foreseen:
    # A block that is about to be read, or to get new content.
    uint64_t block
    bint read

cdef void foresee(Blocks disk, const Foreseen* blocks, uint32_t count) noexcept nogil
cdef void foresee_reading(PoolCore pool, Blocks disk, uint64_t first, uint64_t count) noexcept nogil
