from libc.stdint cimport uint32_t

from nbdzram.engine.core cimport PoolCore

cdef class Pool(PoolCore):
    cdef object making  # a lock: from choosing a directory entry and a name until they are the disk's

    cdef void _use_export_entry(self, uint32_t number) noexcept nogil
    cdef uint32_t _free_domain(self)
