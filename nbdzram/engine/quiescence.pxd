from libc.stdint cimport uint32_t, uint64_t

cdef bint online() noexcept nogil
cdef void offline() noexcept nogil
cdef void quiescent() noexcept nogil
cdef void away() noexcept nogil
cdef void back() noexcept nogil
cdef uint64_t grace_begin() noexcept nogil
cdef bint grace_over(uint64_t stamp) noexcept nogil
cdef void grace_wait(uint64_t stamp) noexcept nogil
cdef uint32_t thread_number() noexcept nogil
cdef uint64_t calls_ever() noexcept nogil
