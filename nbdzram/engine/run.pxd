from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.pool cimport Pool

cdef class Run:
    cdef Pool pool
    cdef uint64_t _done, _total

    cdef bint _step(self, uint32_t budget) noexcept nogil
    cdef bint _go_on(self) except -1
