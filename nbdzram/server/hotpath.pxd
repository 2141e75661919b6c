from libc.stdint cimport int64_t, uint8_t, uint64_t

from nbdzram.engine.disk cimport Disk
from nbdzram.nbd.transmission cimport Request, Rules
from nbdzram.server.inbox cimport Inbox
from nbdzram.server.outlet cimport Outlet
from nbdzram.server.traffic cimport Traffic
from nbdzram.server.workers cimport Budget, Piece, Workers

cpdef enum Stage:
    # How far the end of a connection has come. Only onwards, and GONE only from LOST: see HotPath.move.
    OPEN = 0        # reads, performs, answers
    DRAINING = 1    # reads no more: end of file, or the server stops. What was asked for completely is performed
    HALTED = 2      # performs no more: DISC, or a broken protocol. What is under way is answered
    CLOSING = 3     # everything is answered, and the last replies leave
    LOST = 4        # nothing can be sent any more. What is under way comes back and is dropped
    GONE = 5        # nothing is under way

cdef class HotPath  # Operation's declaration, next, needs it

from nbdzram.server.operation cimport Operation

cdef class HotPath:
    cdef readonly Disk disk
    cdef readonly Traffic traffic
    cdef Budget budget
    cdef Workers workers
    cdef object turns             # Turns: who may store a large payload as it arrives
    cdef Rules rules
    cdef bint syncs               # FLUSH and FUA wait for the disk that the arena lies on (server/syncs)
    cdef object transport
    cdef Inbox inbox
    cdef Outlet outlet
    cdef readonly Stage stage
    cdef bint reading
    cdef bint scheduled
    cdef int phase
    cdef Request request
    cdef int verdict              # of the request whose payload is being skipped or applied
    cdef uint64_t remaining       # bytes of its payload still to come
    cdef Piece payload
    cdef uint64_t started         # when the last wake-up began, or the client attached
    cdef readonly uint64_t requests  # taken since it attached
    cdef int64_t allowance
    cdef list operations
    cdef int weight               # of their tasks that are under way, READs aside
    cdef Operation exclusive
    cdef uint64_t connection_limit
    cdef uint64_t payload_bytes   # held by writes under way
    cdef uint64_t piece_bytes     # held by read replies being made or waiting
    cdef public int pending       # slow requests under way

    cpdef bint move(self, Stage stage) except -1
    cdef int run(self) except -1
    cdef int fail_loudly(self) except -1
    cdef bint advance(self) except -1
    cdef bint take_request(self) except -1
    cdef bint take_read(self, int size) except -1
    cdef bint take_large_read(self, int size) except -1
    cdef bint take_write(self, int size) except -1
    cdef bint take_status(self, int size) except -1
    cdef int free_inline(self) except -1
    cdef int start_operation(self, Piece payload, uint64_t step, bint whole) except -1
    cdef bint begin_payload(self, int size) except -1
    cdef bint begin_skip(self, int size, int verdict) except -1
    cdef bint apply_payload(self) except -1
    cdef int end_payload(self) except -1
    cdef int conclude(self) except -1
    cdef int conclude_or_refuse(self, int error) except -1
    cdef int refuse(self, int verdict) except -1
    cdef int fail(self, const Request* request, int verdict, failed_at) except -1
    cdef int reply_success(self, const Request* request) except -1
    cdef bytes success(self, const Request* request)
    cdef int settle(self) except -1
    cdef bint spent(self) except -1
    cdef int continue_later(self) except -1

cdef object asked(const Request* request)
cdef bint must_last(const Request* request) noexcept
