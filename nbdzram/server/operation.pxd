from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport Request
from nbdzram.server.workers cimport Piece, TaskOwner

cdef class Operation(TaskOwner)  # HotPath's declaration, next, needs it

from nbdzram.server.hotpath cimport HotPath

cdef enum:
    PIECE_SIZE = 256 << 10        # one task of a READ or WRITE, and the largest unfragmented READ
    SMALL_PIECE = 4 << 10         # a step of a READ when the budget is used up: 4 MiB for a thousand that never read

cdef class Operation(TaskOwner):
    cdef HotPath session
    cdef Request request
    cdef uint64_t started
    cdef uint64_t step            # bytes a task
    cdef uint64_t cursor          # bytes submitted so far
    cdef uint64_t done            # bytes taken back so far
    cdef int in_flight
    cdef int verdict
    cdef uint64_t failed_at
    cdef Piece payload
    cdef bint whole               # a READ that is one task, or exclusive
    cdef bint exclusive           # a reply of one long stream: its pieces leave in order, and nothing else meanwhile
    cdef uint64_t sent
    cdef dict arrived
    cdef int submit(self) except -1
    cdef bint room(self, uint64_t size) noexcept
    cdef uint64_t next_step(self) except -1
    cdef bint alone(self) except -1
    cdef int begin_stream(self) except -1
    cdef int read_inline(self) except -1
    cdef int finish(self) except -1
    cdef int send_in_order(self) except -1

cdef Operation new_operation(HotPath session, Piece payload, uint64_t step, bint whole)
