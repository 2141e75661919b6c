from libc.stdint cimport uint8_t

from nbdzram.sessions.budget cimport Budget

cdef class Inbox:
    cdef uint8_t* bytes
    cdef size_t size
    cdef size_t taken         # bytes[taken:filled] is not yet understood
    cdef size_t filled
    cdef size_t charged
    cdef Budget budget
    cdef bint rested          # nothing came since the last call of rest()

    cdef bint open(self, size_t size) noexcept nogil
    cdef size_t room(self) noexcept nogil
    cdef bint grow(self, size_t size) noexcept nogil
    cdef void rest(self) noexcept nogil
    cdef void put_back(self, const uint8_t* source, size_t size) noexcept nogil
    cdef void close(self) noexcept nogil

    cdef inline size_t available(self) noexcept nogil:
        return self.filled - self.taken

    cdef inline uint8_t* front(self) noexcept nogil:
        return self.bytes + self.taken
