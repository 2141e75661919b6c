"""What came from a connection and is not yet understood: bytes[taken:filled].

Begins small, so that a thousand idle connections stay small, doubles for a busy one as long as the budget of all
connections has room, and is small again after a quiet second. Requests that do not fit go another way (server.hotpath), so it may always stay as it is.
"""

cimport cython
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove

from nbdzram.server.workers cimport Budget

cdef enum:
    FIRST_SIZE = 8 << 10      # at least two blocks: unaligned payloads without a buffer pass through it
    LAST_SIZE = 256 << 10     # one read of a busy connection


@cython.no_gc_clear  # its budget must still be there when it dies
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
        if not self.budget.take_half(wanted - self.size):
            return False
        self.charged += wanted - self.size
        self.resize(wanted)
        self.rested = False
        return True

    cdef int rest(self) except -1:
        """Called now and then: shrink when nothing came since the last call."""
        if not self.rested:
            self.rested = True
        elif self.taken == self.filled and self.size > FIRST_SIZE:
            self.taken = self.filled = 0
            self.resize(FIRST_SIZE)
            self.budget.give_back(self.charged)
            self.charged = 0
        return 0

    cdef int resize(self, size_t size) except -1:
        cdef uint8_t* moved = <uint8_t*>realloc(self.bytes, size)
        if moved == NULL:
            raise MemoryError("no memory for a receive buffer")
        self.bytes = moved
        self.size = size
        return 0
