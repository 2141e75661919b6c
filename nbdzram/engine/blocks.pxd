from libc.stdint cimport int64_t, uint32_t, uint64_t

from nbdzram.engine.directory cimport ExportEntry
from nbdzram.engine.pool cimport Pool

cdef class Blocks:
    cdef readonly Pool pool
    cdef readonly uint32_t number
    cdef readonly str name
    cdef ExportEntry* entry
    cdef uint64_t size
    cdef uint64_t stored
    cdef uint64_t same
    cdef bint retired
    cdef uint64_t recounted  # blocks below are counted by the check under way
    cdef uint64_t found_stored, found_same  # among them

    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil
    cdef uint32_t count_on(self, uint32_t limit) noexcept nogil
    cdef uint32_t _kind_bits(self, uint64_t entry, bint leaf_shared) noexcept nogil
