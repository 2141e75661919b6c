from libc.stdint cimport int64_t, uint8_t, uint64_t

from nbdzram.sessions.budget cimport Budget, Piece
from nbdzram.sessions.line cimport Line

cdef enum:
    SCRATCH_SIZE = (256 << 10) + 4096  # the largest step of a reply, with its headers; sockets take as much at once

cdef struct Scratch:
    # What a thread lends to the session whose turn it is.
    uint8_t* bytes            # where the answers of a turn are put together; empty between two sessions
    uint64_t served           # requests that its sessions took, ever
    bint alone                # no other session is known to have a turn now
    int64_t early             # what one alone does of a turn before its answers are sent, as `cost` counts

cdef class Outlet:
    cdef Line line
    cdef Budget budget
    cdef Scratch* scratch
    cdef size_t used          # bytes of the scratch that this session has filled in this turn
    cdef Piece* first         # what the peer does not take now, in order
    cdef Piece* last
    cdef size_t reserved      # charged to the budget for a line that has buffers of its own
    cdef bint broken          # nothing can be sent any more

    cdef uint8_t* reserve(self, size_t size) noexcept nogil
    cdef void put(self, const uint8_t* reply, size_t size) noexcept nogil
    cdef void send_ahead(self) noexcept nogil
    cdef void flush(self) noexcept nogil
    cdef void send(self, Piece* piece) noexcept nogil
    cdef void drain(self) noexcept nogil
    cdef void close(self) noexcept nogil
    cdef void _keep(self, Piece* piece) noexcept nogil
    cdef ssize_t _give(self, const uint8_t* source, size_t size) noexcept nogil

    cdef inline bint blocked(self) noexcept nogil:
        # The peer must read before there is more for it.
        return self.first != NULL
