from libc.stdint cimport uint64_t

from nbdzram.engine.blocks cimport Blocks

cdef enum:
    FORESEEN = 32  # blocks at a time: as many fetches as a processor has under way, twice

cdef struct Foreseen:
    # A block that is about to be read, or to get new content.
    uint64_t block
    bint read

cdef void foresee(Blocks disk, const Foreseen* blocks, int count) noexcept nogil
