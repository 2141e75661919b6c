from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from nbdzram.nbd.transmission cimport EXTENDED_REQUEST_SIZE
from nbdzram.sessions.block_status cimport Contexts
from nbdzram.sessions.budget cimport Piece
from nbdzram.sessions.inbox cimport Inbox
from nbdzram.sessions.stage cimport Ending, Stage
from nbdzram.sessions.turns cimport Turn, Turns
from nbdzram.sessions.work cimport Work

cdef enum Phase:  # what the next bytes are
    HEADER = 0      # a request's header, and a small WRITE's payload: both in the inbox
    PAYLOAD = 1     # a large WRITE's payload, read straight into a buffer of its own
    APPLY = 2       # the same without a buffer, because the budget is used up: stored as it arrives, in turns
    SKIP = 3        # the payload of a request that is refused

cdef class Requests(Work):
    cdef Inbox inbox
    cdef Contexts contexts
    cdef Turns turns
    cdef Turn turn
    cdef uint64_t connection_limit
    cdef Phase phase
    cdef int verdict             # of the request whose payload is being skipped or applied
    cdef uint64_t remaining      # bytes of its payload still to come
    cdef Piece* payload
    cdef uint8_t header[EXTENDED_REQUEST_SIZE]  # of the request whose payload waits for its turn, as it came
    cdef int header_size
    cdef uint64_t header_epoch   # of the limits under which it began; 0: there were none
    cdef bint releasing          # the line is to outlive the session: no payload is begun whose end did not come
    cdef uint32_t foreseen       # requests in the inbox for which memory was asked already

    cdef bint move(self, Stage stage) noexcept nogil
    cdef void halt(self, Ending cause, int64_t value) noexcept nogil
    cdef bint advance(self) noexcept nogil
    cdef void look_ahead(self) noexcept nogil
    cdef bint take_request(self) noexcept nogil
    cdef bint take_read(self, int size) noexcept nogil
    cdef bint take_write(self, int size) noexcept nogil
    cdef bint take_status(self, int size) noexcept nogil
    cdef bint begin_payload(self, int size) noexcept nogil
    cdef bint waits_for_turn(self) noexcept nogil
    cdef void put_back(self) noexcept nogil
    cdef bint begin_skip(self, int size, int verdict) noexcept nogil
    cdef bint apply_payload(self) noexcept nogil
    cdef void end_payload(self) noexcept nogil
