"""What came from a client and is not yet understood: bytes[taken:filled].

Begins small, so that a thousand idle clients stay small, doubles for a busy one as long as the budget has room, and is
small again after a quiet second. Requests that do not fit go another way (requests.pyx), so it may always stay as it
is.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from nbdzram.engine.must cimport must
from nbdzram.sessions.budget cimport Budget

cdef enum:
    FIRST_SIZE = 8 << 10      # at least two blocks: unaligned payloads without a buffer pass through it
    LAST_SIZE = 256 << 10     # one read of a busy connection


cdef class Inbox:
    """See the module's docstring."""

    def __cinit__(self, Budget budget not None):
        self.budget = budget

    def __dealloc__(self):
        free(self.bytes)

    cdef bint open(self, size_t size) noexcept nogil:
        """Room for at least `size` bytes, whatever the budget says: another process had them, or a handshake, and they
        are there. False: there is no memory."""
        self.size = FIRST_SIZE
        while self.size < size:
            self.size *= 2
        self.bytes = <uint8_t*>malloc(self.size)
        if self.bytes == NULL:
            return False
        self.charged = self.size - FIRST_SIZE
        self.budget.force(self.charged)
        return True

    cdef void close(self) noexcept nogil:
        """Hold nothing any more; nothing may be received after this."""
        free(self.bytes)
        self.bytes = NULL
        self.size = self.taken = self.filled = 0
        self.budget.give_back(self.charged)
        self.charged = 0

    cdef size_t room(self) noexcept nogil:
        """Free bytes behind `filled`; what is there moves to the front when that pays."""
        if self.taken:
            if self.taken == self.filled:
                self.taken = self.filled = 0
            elif self.size - self.filled < self.size // 2:
                memmove(self.bytes, self.bytes + self.taken, self.filled - self.taken)
                self.filled -= self.taken
                self.taken = 0
        return self.size - self.filled

    cdef bint grow(self, size_t size) noexcept nogil:
        """Hold `size` bytes, if that is not too much for one client, and budget and system have room."""
        cdef size_t wanted = self.size
        cdef uint8_t* moved
        if size > LAST_SIZE:
            return False
        while wanted < size:
            wanted *= 2
        if not self.budget.take_half(wanted - self.size):
            return False
        moved = <uint8_t*>realloc(self.bytes, wanted)
        if moved == NULL:
            self.budget.give_back(wanted - self.size)
            return False
        self.charged += wanted - self.size
        self.bytes = moved
        self.size = wanted
        self.rested = False
        return True

    cdef void put_back(self, const uint8_t* source, size_t size) noexcept nogil:
        """These were taken last, and are to be taken once more. Nothing was received since."""
        if self.taken == 0:
            must(self.filled == 0, b"an inbox from which something was taken has room before what follows it")
            self.taken = self.filled = size  # it rested
        self.taken -= size
        memcpy(self.bytes + self.taken, source, size)

    cdef void rest(self) noexcept nogil:
        """Called now and then: shrink when nothing came since the last call."""
        cdef uint8_t* moved
        if not self.rested:
            self.rested = True
        elif self.taken == self.filled and self.charged:
            self.taken = self.filled = 0
            moved = <uint8_t*>realloc(self.bytes, self.size - self.charged)
            if moved != NULL:
                self.bytes = moved
                self.size -= self.charged
                self.budget.give_back(self.charged)
                self.charged = 0
