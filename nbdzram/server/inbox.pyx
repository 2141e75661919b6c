"""What came from a connection and is not yet understood: bytes[taken:filled].

Begins small, so that a thousand idle connections stay small, and doubles for a busy one as long as the budget of all
connections has room. Requests that do not fit go another way (server.hotpath), so it may always stay as it is.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove

from nbdzram.server.workers cimport Budget

cdef enum:
    FIRST_SIZE = 16 << 10
    LAST_SIZE = 256 << 10     # one read of a busy connection


cdef class Inbox:
    """See the module's docstring."""

    def __cinit__(self, Budget budget not None):
        self.budget = budget
        self.size = FIRST_SIZE
        self.bytes = <uint8_t*>malloc(self.size)
        if self.bytes == NULL:
            raise MemoryError("no memory for a receive buffer")

    def __dealloc__(self):
        self.close()

    cdef void close(self) noexcept:
        """Hold nothing any more; nothing may be received after this."""
        free(self.bytes)
        self.bytes = NULL
        self.size = self.taken = self.filled = 0
        self.budget.give_back(self.charged)
        self.charged = 0

    cdef int make_room(self, size_t size) except -1:
        """At least `size` free bytes behind `filled`; what is there moves to the front when that pays."""
        if self.taken:
            if self.taken == self.filled:
                self.taken = self.filled = 0
            elif self.size - self.filled < max(size, self.size // 2):
                memmove(self.bytes, self.bytes + self.taken, self.filled - self.taken)
                self.filled -= self.taken
                self.taken = 0
        if self.size - self.filled < size and not self.grow(self.filled + size):
            # A transport that still delivers after pause_reading: take it, whatever the budget says.
            self.budget.force(size)
            self.charged += size
            self.resize(self.size + size)
        return 0

    cdef bint grow(self, size_t size) except -1:
        """Hold `size` bytes, if that is not too much for one connection and the budget has room."""
        cdef size_t wanted = self.size
        if size > LAST_SIZE:
            return False
        while wanted < size:
            wanted *= 2
        if not self.budget.take(wanted - self.size):
            return False
        self.charged += wanted - self.size
        self.resize(wanted)
        return True

    cdef int resize(self, size_t size) except -1:
        cdef uint8_t* moved = <uint8_t*>realloc(self.bytes, size)
        if moved == NULL:
            raise MemoryError("no memory for a receive buffer")
        self.bytes = moved
        self.size = size
        return 0
