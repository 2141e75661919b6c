from libc.stdint cimport uint32_t, uint64_t

from nbdzram.sessions.epoll cimport epoll_event
from nbdzram.sessions.mail cimport Bell, Mailbox
from nbdzram.sessions.outlet cimport Scratch
from nbdzram.sessions.patience cimport Patience
from nbdzram.sessions.session cimport Session
from nbdzram.sessions.workers cimport Workers

cdef enum:  # wishes to a thread
    REST = 1     # a second went by
    FINISH = 2   # no session is left: end
    AGAIN = 4    # somebody has more to do, on a desk that nobody waits at

cdef class Desk:
    cdef Mailbox box
    cdef Bell bell
    cdef Scratch scratch
    cdef Workers workers
    cdef readonly int number     # by which it counts (tally.pxd)
    cdef void* first             # Sessions that it serves
    cdef void* first_ready       # the queue: those of them that have more to do, or more than little
    cdef void* last_ready
    cdef void* first_held        # those that wait for a place in their export's schedule
    cdef void* last_held
    cdef uint64_t next_due       # the first of those places, or earlier
    cdef int poller              # epoll's descriptor; -1: none
    cdef bint finished
    cdef readonly int sessions   # that were given to it and are not gone: the loop's count
    cdef uint64_t busy_ns        # since the start
    cdef uint64_t longest_ns     # of a turn, since somebody asked

    cdef void take_mail(self) noexcept nogil
    cdef void take_turns(self) noexcept nogil
    cdef void take_turn(self, Session session) noexcept nogil
    cdef void rounds(self, uint32_t wishes) noexcept nogil
    cdef void hold(self, Session session) noexcept nogil
    cdef void let_on(self) noexcept nogil
    cdef void again(self) noexcept nogil
    cdef void after(self, Session session) noexcept nogil
    cdef void expect(self, int way) noexcept nogil
    cdef uint64_t begin_turn(self) noexcept nogil
    cdef void end_turn(self, uint64_t began) noexcept nogil
    cdef void admit(self, Session session) noexcept nogil
    cdef void queue(self, Session session) noexcept nogil
    cdef void meet(self, Session session, uint32_t found) noexcept nogil
    cdef void wake(self, Session session, uint32_t found) noexcept nogil
    cdef void part(self, Session session) noexcept nogil

cdef class IoThread(Desk):
    cdef object thread
    cdef Patience patience
    cdef uint64_t served         # what scratch.served was when the last turn began
    cdef void serve(self) noexcept nogil
    cdef int wait(self, epoll_event* events) noexcept nogil
