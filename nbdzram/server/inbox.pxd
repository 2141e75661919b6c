from libc.stdint cimport uint8_t

from nbdzram.server.workers cimport Budget

cdef class Inbox:
    cdef uint8_t* bytes
    cdef size_t size
    cdef size_t taken         # bytes[taken:filled] is not yet understood
    cdef size_t filled
    cdef size_t charged
    cdef Budget budget
    cdef bint rested          # nothing came since the last call of rest()

    cdef int make_room(self, size_t size) except -1
    cdef bint grow(self, size_t size) except -1
    cdef int rest(self) except -1
    cdef int resize(self, size_t size) except -1
    cdef void close(self) noexcept

    cdef inline size_t available(self) noexcept nogil:
        return self.filled - self.taken

    cdef inline uint8_t* front(self) noexcept nogil:
        return self.bytes + self.taken
