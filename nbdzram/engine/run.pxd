from libc.stdint cimport int64_t, uint32_t, uint64_t

from nbdzram.engine.core cimport PoolCore

cdef class Run:
    cdef PoolCore pool
    cdef uint64_t _done, _total
    cdef int cause           # of the slots that this run retires (slab.pxd)
    cdef int64_t returned    # pages, less those that were taken

    cdef bint _step(self, uint32_t budget) noexcept nogil
    cdef bint _go_on(self) except -1
