from libc.stdint cimport int64_t, uint64_t

from nbdzram.engine.disk cimport Disk
from nbdzram.nbd.sentences cimport SENTENCE_SIZE
from nbdzram.nbd.transmission cimport REPLY_OVERHEAD, Request, Rules
from nbdzram.sessions.budget cimport Budget
from nbdzram.sessions.mail cimport Bell
from nbdzram.sessions.notices cimport Notices
from nbdzram.sessions.outlet cimport Outlet
from nbdzram.sessions.stage cimport Ending, Stage
from nbdzram.sessions.tally cimport Counts

cdef enum:
    UNFRAGMENTED = 256 << 10      # the largest READ with DF
    LOGGED = 10                   # errors of one session; who errs more often is summed up when it leaves
    TOLD_BYTES = REPLY_OVERHEAD + SENTENCE_SIZE  # of the longest answer without content

cdef extern from * nogil:
    """
    #include <stdint.h>
    /* Who sees the number sees also how that sync ended, which is written before it. */
    static inline void syncs_tell(uint64_t* done, uint64_t to) { __atomic_store_n(done, to, __ATOMIC_RELEASE); }
    static inline uint64_t syncs_told(uint64_t* done) { return __atomic_load_n(done, __ATOMIC_ACQUIRE); }
    """
    void syncs_tell(uint64_t* done, uint64_t to)
    uint64_t syncs_told(uint64_t* done)

cdef struct Unsynced:
    # A request that is answered when a sync that began after it has ended.
    Unsynced* next
    Request request
    uint64_t started
    uint64_t number

cdef class Answers:
    cdef readonly Disk disk
    cdef readonly uint64_t number
    cdef Counts* counts          # this thread's of the export
    cdef Budget budget
    cdef Notices notices
    cdef Outlet outlet
    cdef Rules rules
    cdef bint syncs              # FLUSH and FUA wait for the disk that the arena lies on (server/syncs)
    cdef Stage stage_now
    cdef readonly Ending ending
    cdef readonly int64_t ending_value
    cdef Bell tidings            # rung at the event loop
    cdef uint64_t started        # when the last turn began
    cdef uint64_t errors
    cdef Unsynced* unsynced      # the oldest first
    cdef int unsynced_count
    cdef uint64_t syncs_asked    # how many so far
    cdef uint64_t syncs_done     # up to which number; the loop writes
    cdef bint syncs_failed

    cdef void end(self, Ending cause, int64_t value) noexcept nogil
    cdef void conclude(self, const Request* request) noexcept nogil
    cdef void refuse(self, const Request* request, int verdict, uint64_t started, int64_t failed_at) noexcept nogil
    cdef void fail(self, const Request* request, int verdict, int64_t failed_at) noexcept nogil
    cdef void reply_success(self, const Request* request) noexcept nogil
    cdef void wait_for_sync(self, const Request* request, uint64_t started) noexcept nogil
    cdef void fall_apart(self) noexcept nogil
    cdef void answer_synced(self) noexcept nogil

cdef bint must_last(const Request* request) noexcept nogil
