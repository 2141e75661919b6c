from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.arena cimport Region

cdef enum:
    COMPLAINT = 240  # bytes of what a check complains of

cdef class Census:
    cdef uint64_t counted  # numbers below have been counted once
    cdef uint64_t opened   # of them, changed since
    cdef Region bits       # a bit a number: it is open
    cdef Region numbers    # of uint32_t: the open ones

    cdef void change(self, uint32_t number) noexcept nogil
    cdef bint is_settled(self, uint64_t number) noexcept nogil
    cdef bint reserve(self, uint64_t count) noexcept nogil
    cdef uint32_t count_on(self, uint64_t end, uint32_t limit, char* complaint) noexcept nogil

    cdef void weigh(self, uint32_t number, int sign) noexcept nogil
    cdef uint32_t look(self, uint32_t number, char* complaint) noexcept nogil
