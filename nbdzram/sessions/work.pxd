from libc.stdint cimport int64_t, uint8_t, uint64_t

from nbdzram.engine.twins cimport Twins
from nbdzram.nbd.transmission cimport Request
from nbdzram.sessions.answers cimport Answers
from nbdzram.sessions.block_status cimport Contexts, Telling
from nbdzram.sessions.budget cimport Piece
from nbdzram.sessions.mail cimport Bell
from nbdzram.sessions.storing cimport Storing
from nbdzram.sessions.throttle cimport Place, Throttle
from nbdzram.sessions.workers cimport Task, Workers

cdef enum:
    STEP = 256 << 10              # of a long READ, and one task of a large WRITE
    SMALL_STEP = 4 << 10          # of a READ when the budget is used up: 4 MiB for a thousand that never read

cdef enum Way:  # how the long request under way is answered
    NONE = 0
    CHUNKS = 1      # READ: chunks of their own, which leave as they are made
    WHOLE = 2       # READ: a reply that may not be cut, made in a buffer, so that a failure can still be told
    STREAM = 3      # READ: the same without memory for it: its header goes ahead
    STEPS = 4       # WRITE, TRIM, WRITE_ZEROES: a part in each turn, and one reply
    LOOKS = 5       # BLOCK_STATUS: what the export's blocks share is looked for in each turn, and gathered in others

cdef struct Job:
    Request request
    uint64_t started
    uint64_t cursor              # bytes done
    Piece* piece                 # WRITE: the payload; WHOLE: the reply; LOOKS: memory of the twins, if there is some
    Contexts contexts            # LOOKS
    Twins twins
    Telling telling              # LOOKS: its lists are held from turn to turn, 8 KiB a context at most
    Way way

cdef struct Store:
    # A large WRITE whose parts the workers store.
    Store* next
    void* session
    Request request
    uint64_t started
    Piece* payload
    uint64_t cursor              # bytes handed out: done <= cursor <= request.length
    uint64_t done
    uint64_t failed_at
    int in_flight
    int verdict

cdef class Work(Answers):
    cdef Workers workers
    cdef readonly uint64_t requests  # taken since it attached
    cdef Throttle throttle       # of the export
    cdef Place place             # of the next request, in its schedule
    cdef bint throttled          # the next request is there, and waits for its place
    cdef bint hurried            # the server ends this session: it waits for no place any more
    cdef Bell bell               # rung at its thread
    cdef Request request         # the one that was taken last
    cdef int64_t allowance       # what is left of this turn, in bytes of ordinary requests
    cdef bint later              # there is more to do, in another turn
    cdef Job job
    cdef Storing learnt          # who is to store its large WRITEs
    cdef Store* stores           # the oldest first
    cdef int store_count
    cdef int tasks               # of theirs that are under way
    cdef uint64_t payload_bytes  # that they hold

    cdef bint may_begin(self) noexcept nogil
    cdef void begin_request(self) noexcept nogil
    cdef void start_job(self, Way way, Piece* piece) noexcept nogil
    cdef bint start_read(self) noexcept nogil
    cdef bint step(self) noexcept nogil
    cdef bint step_read(self, uint64_t length) noexcept nogil
    cdef void start_look(self, const Contexts* contexts, size_t room) noexcept nogil
    cdef bint step_look(self) noexcept nogil
    cdef size_t descriptors(self) noexcept nogil
    cdef int tell_status(self, const Request* request, const Contexts* contexts, uint8_t* target) noexcept nogil
    cdef int put_told(
        self, const Request* request, const Contexts* contexts, Telling* telling, uint8_t* target
    ) noexcept nogil
    cdef void finish_job(self, int verdict, uint64_t failed_at) noexcept nogil
    cdef void start_store(self, Piece* payload) noexcept nogil
    cdef void hand_out(self) noexcept nogil
    cdef void finish_store(self, Store* store) noexcept nogil
    cdef void learn(self, const Request* request, bint beside) noexcept nogil
    cdef void take_home(self, Task* task) noexcept nogil
    cdef bint busy(self) noexcept nogil
    cdef void drop_work(self) noexcept nogil
