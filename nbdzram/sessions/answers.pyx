"""What a client is answered: replies, errors with their sentences, and answers that wait until a disk has what was
stored.

The lowest of four parts of a session: Answers, Work (work.pyx: long requests), Requests (requests.pyx: what came is
understood), Session (session.pyx: what its thread calls, and how it ends).

Invariant: a request is counted when its answer is put into the outlet, before the client can know it.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from nbdzram.nbd.sentences cimport SENTENCE_SIZE, error_of, put_sentence
from nbdzram.nbd.transmission cimport (
    BLOCK_STATUS, FLUSH, FRAGMENTED, FUA, NOT_AN_OFFSET, NOT_SYNCED, OK, OVER_QUOTA, POOL_FULL, READ, REPLY_OVERHEAD,
    TRIM, UNREADABLE, WRITE, WRITE_ZEROES, Request, put_error, put_success,
)
from nbdzram.sessions.mail cimport bell_ring
from nbdzram.sessions.stage cimport LOST, NO_MEMORY, NOT_ENDING, Ending
from nbdzram.sessions.tally cimport count_done, count_timed, monotonic
from nbdzram.sessions.wishes cimport ENDED, SYNC

UNFRAGMENTED_LIMIT = UNFRAGMENTED
LOGGED_ERRORS = LOGGED


cdef bint must_last(const Request* request) noexcept nogil:
    """Its answer says that something is on the disk, where the arena lies on one: FLUSH, or a change with FUA."""
    if request.command == FLUSH:
        return True
    return request.flags & FUA != 0 and (
        request.command == WRITE or request.command == TRIM or request.command == WRITE_ZEROES
    )


cdef class Answers:
    """See the module's docstring."""

    @property
    def error_count(self):
        """Requests that were refused or failed."""
        return self.errors

    def __dealloc__(self):
        cdef Unsynced* waiting
        while self.unsynced != NULL:
            waiting = self.unsynced
            self.unsynced = waiting.next
            free(waiting)

    cdef void fall_apart(self) noexcept nogil:
        """There is no memory for the next step: nothing is sent any more, and the session ends as its turn does."""
        self.end(NO_MEMORY, 0)
        self.outlet.broken = True

    cdef void conclude(self, const Request* request) noexcept nogil:
        """Answer a request of this turn, without payload."""
        if self.syncs and must_last(request):
            self.wait_for_sync(request, self.started)
            return
        self.reply_success(request)
        count_done(self.counts, request.command, request.length)

    @property
    def stage(self):
        """How far its end has come, a moment ago."""
        return self.stage_now

    @property
    def idle_seconds(self):
        """Since the last turn, as a rule one in which a request came."""
        return max(monotonic() - <double>self.started, 0.0) / 1e9

    cdef void refuse(self, const Request* request, int verdict, uint64_t started, int64_t failed_at) noexcept nogil:
        """Count a request that was refused or failed, and say so to the client and the log."""
        count_timed(self.counts, request.command, verdict, request.length, monotonic() - started)
        self.fail(request, verdict, failed_at)

    cdef void fail(self, const Request* request, int verdict, int64_t failed_at) noexcept nogil:
        """Send the error reply, with a sentence for people. `failed_at`: where it failed, if that is known."""
        cdef char text[SENTENCE_SIZE]
        cdef uint8_t reply[TOLD_BYTES]
        cdef uint64_t limit = UNFRAGMENTED if verdict == FRAGMENTED else self.rules.payload_limit
        cdef size_t length = put_sentence(text, verdict, request, self.rules.size, limit)
        # Section "Structured reply types", ERROR_OFFSET: it lies in the range that was asked for.
        if (verdict != POOL_FULL and verdict != OVER_QUOTA and verdict != UNREADABLE) or not (
            request.command == READ or request.command == WRITE or request.command == TRIM
            or request.command == BLOCK_STATUS
        ):
            failed_at = NOT_AN_OFFSET
        elif failed_at == NOT_AN_OFFSET:
            failed_at = request.offset
        self.errors += 1
        if self.errors <= LOGGED:
            self.notices.post(self.number, verdict, request, self.rules.size)
        self.outlet.put(
            reply,
            put_error(reply, request, self.rules.style, error_of(verdict, request.command), text, length, failed_at),
        )

    cdef void reply_success(self, const Request* request) noexcept nogil:
        cdef uint8_t reply[REPLY_OVERHEAD]
        self.outlet.put(reply, put_success(reply, self.rules.style, request) - reply)

    cdef void wait_for_sync(self, const Request* request, uint64_t started) noexcept nogil:
        """Answer when a sync that begins from now on has ended; the event loop sees to it."""
        cdef Unsynced* waiting = <Unsynced*>malloc(sizeof(Unsynced))
        cdef Unsynced** end = &self.unsynced
        if waiting == NULL:
            self.fall_apart()
            return
        while end[0] != NULL:
            end = &end[0].next
        end[0] = waiting
        waiting.next = NULL
        waiting.request = request[0]
        waiting.started = started
        self.syncs_asked += 1
        waiting.number = self.syncs_asked
        self.unsynced_count += 1
        bell_ring(&self.tidings, SYNC)

    cdef void answer_synced(self) noexcept nogil:
        """Answer all whose sync has ended."""
        cdef Unsynced* waiting
        cdef int verdict
        while self.unsynced != NULL and self.unsynced.number <= syncs_told(&self.syncs_done):
            waiting = self.unsynced
            self.unsynced = waiting.next
            self.unsynced_count -= 1
            verdict = NOT_SYNCED if self.syncs_failed else OK
            if self.stage_now < LOST:
                if verdict != OK:
                    self.refuse(&waiting.request, verdict, waiting.started, NOT_AN_OFFSET)
                else:
                    self.reply_success(&waiting.request)
                    count_timed(
                        self.counts, waiting.request.command, OK, waiting.request.length, monotonic() - waiting.started
                    )
            free(waiting)

    cdef void end(self, Ending cause, int64_t value) noexcept nogil:
        """Remember why, and let the log know; the first reason counts."""
        if self.ending == NOT_ENDING:
            self.ending = cause
            self.ending_value = value
            bell_ring(&self.tidings, ENDED)
