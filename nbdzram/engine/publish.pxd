from libc.stdint cimport uint32_t, uint64_t

cdef void publish64(uint64_t* place, uint64_t value) noexcept nogil
cdef void publish32(uint32_t* place, uint32_t value) noexcept nogil
