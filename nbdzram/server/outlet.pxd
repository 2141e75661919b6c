from libc.stdint cimport uint8_t

from nbdzram.server.channel cimport TlsChannel
from nbdzram.server.workers cimport Budget, Piece

cdef class Scratch:
    cdef uint8_t* bytes
    cdef size_t size

cdef class Outlet:
    cdef object transport
    cdef TlsChannel channel   # the transport, if it is one; else None
    cdef int fd               # for direct sends without TLS
    cdef Scratch scratch
    cdef Budget budget
    cdef size_t held          # bytes that the transport holds, as charged to the budget
    cdef size_t charged       # for the channel itself
    cdef size_t used          # bytes of the scratch filled by this connection in this wake-up
    cdef bint handed_over     # the transport was given bytes, and may still hold them
    cdef bint blocked         # the transport holds bytes that the peer does not take
    cdef bint broken          # the socket is gone; connection_lost will tell

    cdef uint8_t* reserve(self, size_t size) except? NULL
    cdef int put(self, const uint8_t* reply, size_t size) except -1
    cdef int flush(self) except -1
    cdef void discard(self) noexcept
    cdef int write(self, bytes reply) except -1
    cdef int write_piece(self, Piece piece) except -1
    cdef int hand_over(self, buffer, bint weigh=*) except -1
    cdef int weigh(self) except -1
    cdef void close(self) noexcept
    cdef bint can_send(self) except -1
    cdef ssize_t send_now(self, const uint8_t* source, size_t size) except -2
