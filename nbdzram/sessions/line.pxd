from libc.stdint cimport uint8_t

from nbdzram.sessions.stage cimport Ending

cdef enum:  # what take and give may answer beside a number of bytes
    LATER = -1   # nothing has come; the peer takes nothing now
    BROKEN = -2  # and `error` says why

cdef enum:  # what a line is watched for
    WATCH_READ = 1
    WATCH_WRITE = 2

cdef class Line:
    cdef int error               # errno of what broke it
    cdef Ending cause            # how it broke, if not by `error` alone
    cdef size_t grain            # bytes of plain text that a record holds; 1: what is given is sent as it is
    cdef bint more               # it holds bytes that came, of which no poller tells
    cdef void attend(self, int poller, void* session) noexcept nogil
    cdef ssize_t take(self, uint8_t* target, size_t size) noexcept nogil
    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil
    cdef int watch(self, int wanted) noexcept nogil
    cdef bint finish(self) noexcept nogil
    cdef void hang_up(self, bint orderly) noexcept nogil

cdef class SocketLine(Line):
    cdef int fd
    cdef int poller              # of the thread that serves it: epoll's descriptor
    cdef int watched
    cdef bint polled             # the poller knows it
    cdef void* session           # what the poller gives back for it

    cdef void wait_for_peer(self, unsigned int milliseconds) noexcept nogil
    cdef bint stays_here(self) noexcept nogil
    cdef void pace_nothing(self) noexcept nogil
    cdef ssize_t transmit(self, const uint8_t* source, size_t size, int flags) noexcept nogil
