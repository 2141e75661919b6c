from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from nbdzram.sessions.line cimport Line
from nbdzram.sessions.outlet cimport Scratch
from nbdzram.sessions.requests cimport Requests
from nbdzram.sessions.stage cimport Ending
from nbdzram.sessions.tally cimport Tally
from nbdzram.sessions.workers cimport Task

cdef class Session(Requests):
    cdef Tally tally             # keeps the counts
    cdef readonly Line line
    cdef tuple kept              # of these two:
    cdef const uint8_t* greeting_at  # the handshake's last reply
    cdef size_t greeting_size
    cdef const uint8_t* rest_at      # what came behind the handshake
    cdef size_t rest_size
    cdef uint64_t closing_since
    cdef readonly bint left      # the peer closed
    cdef bint was_midway         # when it was lost
    cdef readonly bint released  # its line outlives it
    cdef uint8_t* kept_bytes     # what came behind the last request that was answered
    cdef size_t kept_size
    cdef bint unread             # we would read on, and the line holds bytes of which no poller tells

    cdef object desk             # of its thread; the event loop's word
    cdef Scratch* scratch
    cdef void* next              # of its thread's sessions
    cdef void* before
    cdef void* next_ready
    cdef bint queued             # among those that have more to do, or much
    cdef bint heavy              # its last turn was long, or it is in the middle of a payload
    cdef uint32_t found          # what the poller told of its line while it stands in the queue
    cdef void* next_held
    cdef bint held               # among those that wait for their place
    cdef bint linked

    cdef void begin(self) noexcept nogil
    cdef void readable(self) noexcept nogil
    cdef void arrived(self, size_t size) noexcept nogil
    cdef void writable(self) noexcept nogil
    cdef void go_on(self) noexcept nogil
    cdef void answer_bell(self) noexcept nogil
    cdef void round(self) noexcept nogil
    cdef void hung_up(self) noexcept nogil
    cdef void broke(self, int error) noexcept nogil
    cdef bint may_go(self) noexcept nogil
    cdef void drain(self) noexcept nogil
    cdef void cut(self, Ending cause, int64_t value) noexcept nogil
    cdef void release(self) noexcept nogil
    cdef void let_go(self) noexcept nogil
    cdef bint at_rest(self) noexcept nogil
    cdef void lose(self, bint orderly) noexcept nogil
    cdef void run(self) noexcept nogil
    cdef void settle(self) noexcept nogil
    cdef bint spent(self) noexcept nogil
    cdef int wanted(self) noexcept nogil
    cdef void welcome(self, Task* task) noexcept nogil
