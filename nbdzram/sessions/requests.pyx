"""Requests: understood as they come, validated, performed and answered, or started to be.

    inbox ──> take_request ──> READ, WRITE, BLOCK_STATUS ......... performed and answered at once
                           ├─> long ones, what is shared ......... a Job, in steps (work.pyx); what follows waits
                           ├─> large WRITEs ...................... the payload arrives; then workers, or a Job
                           └─> what is refused ................... its payload is skipped, and then it is answered

Requests are taken in their order. A WRITE changes nothing before its payload is complete, except in phase APPLY, where
there was no room for the payload; see the session's invariants (session.pyx).
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.foresight cimport FORESEEN, Foreseen
from nbdzram.engine.must cimport must
from nbdzram.nbd.transmission cimport (
    BLOCK, BLOCK_STATUS, DF, DISC, NOT_AN_OFFSET, OK, PAYLOAD_LEN, READ, REPLY_OVERHEAD, TRIM, UNREADABLE, WRITE,
    WRITE_ZEROES, WRONG_SHAPE, Request, finish_read, parse_request, read_header_size, validate, verdict_of,
)
from nbdzram.sessions.answers cimport TOLD_BYTES
from nbdzram.sessions.block_status cimport (
    STATUS_PAYLOAD_LIMIT, STATUS_ROOM, Contexts, choose_contexts, room_to_look,
)
from nbdzram.sessions.budget cimport Piece, new_piece
from nbdzram.sessions.costs cimport COST_OF_REFUSAL, INLINE_LIMIT, STORE_LIMIT, cost
from nbdzram.sessions.stage cimport (
    BAD_MAGIC, CLOSING, HALTED, LEFT, LONG_PAYLOAD, OPEN, Ending, Stage, comes_after,
)
from nbdzram.sessions.storing cimport storing_beside, storing_expect
from nbdzram.sessions.tally cimport count_done
from nbdzram.sessions.turns cimport may_go_on, turn_left
from nbdzram.sessions.work cimport NONE, SMALL_STEP, STEPS, Work


cdef class Requests(Work):
    """See the module's docstring."""

    cdef bint move(self, Stage stage) noexcept nogil:
        """Go on to `stage`. False: the session is there already, or further."""
        if not comes_after(stage, self.stage_now):
            return False
        self.stage_now = stage
        return True

    cdef void halt(self, Ending cause, int64_t value) noexcept nogil:
        """Read no more and perform no more; answer what is under way."""
        self.end(cause, value)
        self.move(HALTED)

    cdef bint advance(self) noexcept nogil:
        """Understand a little more of what came. False: nothing can be done now."""
        cdef uint64_t size
        if self.outlet.broken or self.stage_now >= CLOSING:
            return False
        if self.outlet.blocked() and not (self.phase == PAYLOAD and self.remaining == 0):
            return False
        if self.job.way != NONE:
            return self.step()
        if self.stage_now >= HALTED:
            self.inbox.taken = self.inbox.filled
            return False
        if self.phase == HEADER:
            if self.foreseen == 0:
                self.look_ahead()
            if not self.take_request():
                return False
            self.foreseen -= self.foreseen != 0
            self.begin_request()
            return True
        if self.phase == APPLY:
            return self.apply_payload()
        if self.phase == SKIP:
            size = min(<uint64_t>self.inbox.available(), self.remaining)
            self.inbox.taken += size
            self.remaining -= size
            self.allowance -= size
        if self.remaining:
            return False
        self.end_payload()
        return True

    cdef void look_ahead(self) noexcept nogil:
        """Have memory bring what the requests in the inbox will need. One alone waits as long either way."""
        cdef Foreseen blocks[FORESEEN]
        cdef Request request
        cdef size_t at = self.inbox.taken
        cdef int size
        cdef uint32_t count = 0
        while count < FORESEEN:
            must(at <= self.inbox.filled, b"nothing is foreseen behind what came")
            size = parse_request(self.inbox.bytes + at, self.inbox.filled - at, self.rules.style, &request)
            if size <= 0 or request.command > WRITE or not 0 < request.length <= INLINE_LIMIT or (
                    request.offset >= self.disk.size):
                break
            blocks[count].block = request.offset // BLOCK
            blocks[count].read = request.command == READ
            count += 1
            if request.payload >= self.inbox.filled - at - size:
                break
            at += size + request.payload
        if count > 1:
            self.disk.c_foresee(blocks, count)
            self.foreseen = count

    cdef bint take_request(self) noexcept nogil:
        """Take one request from the inbox: validate, then perform and reply, or start what does so later."""
        cdef Request* request = &self.request
        cdef int size
        cdef int verdict
        if self.store_count + self.unsynced_count >= STORE_LIMIT:
            return False
        size = parse_request(self.inbox.front(), self.inbox.available(), self.rules.style, request)
        if size == 0:
            return False
        if self.allowance <= 0:
            self.later = True
            return False
        if size < 0:
            self.halt(BAD_MAGIC, 0)
            return False
        if request.payload > self.rules.payload_limit:
            self.halt(LONG_PAYLOAD, request.payload)
            return False
        if (self.stage_now != OPEN or self.releasing) and self.inbox.available() < size + request.payload:
            return False  # no more is read; whoever goes on with the line begins with this header
        self.rules.size = self.disk.size
        verdict = validate(request, &self.rules)
        if verdict != OK:
            return self.begin_skip(size, verdict)
        if self.throttle.is_limited() and not self.may_begin():
            return False
        self.allowance -= size + cost(request)
        if request.command == READ:
            return self.take_read(size)
        if request.command == WRITE:
            return self.take_write(size)
        if request.command == BLOCK_STATUS:
            return self.take_status(size)
        if self.outlet.reserve(TOLD_BYTES) == NULL:
            return False
        self.inbox.taken += size
        if request.command == DISC:
            self.halt(LEFT, 0)
        elif request.command == TRIM or request.command == WRITE_ZEROES:
            self.start_job(STEPS, NULL)
        else:  # FLUSH and CACHE: every write that was answered is in the engine, and everything is in memory
            self.conclude(request)
        return True

    cdef bint take_read(self, int size) noexcept nogil:
        cdef Request* request = &self.request
        cdef uint8_t* target
        if request.length > INLINE_LIMIT or (request.length > SMALL_STEP and self.budget.strained()):
            if not self.start_read():
                return False
            self.inbox.taken += size
            return True
        target = self.outlet.reserve(request.length + REPLY_OVERHEAD)
        if target == NULL:
            return False
        self.inbox.taken += size
        if request.length == 0:
            self.conclude(request)
            return True
        if self.disk.c_read(request.offset, request.length, target + read_header_size(self.rules.style)):
            self.refuse(request, UNREADABLE, self.started, NOT_AN_OFFSET)
            return True
        self.outlet.used += finish_read(
            target, self.rules.style, request, request.offset, request.length, request.flags & DF != 0, True
        )
        count_done(self.counts, READ, request.length)
        return True

    cdef bint take_write(self, int size) noexcept nogil:
        cdef Request* request = &self.request
        cdef size_t whole = size + request.payload
        cdef int error
        if request.payload > INLINE_LIMIT or (whole > self.inbox.size and not self.inbox.grow(whole)):
            return self.begin_payload(size)
        if self.inbox.available() < whole or self.outlet.reserve(TOLD_BYTES) == NULL:
            return False
        error = self.disk.c_write(request.offset, request.length, self.inbox.front() + size)
        self.inbox.taken += whole
        if error:
            self.refuse(request, verdict_of(error), self.started, NOT_AN_OFFSET)
        else:
            self.conclude(request)
        return True

    cdef bint take_status(self, int size) noexcept nogil:
        cdef Request* request = &self.request
        cdef Request asked = request[0]
        cdef Contexts chosen = self.contexts
        cdef int verdict = OK
        cdef uint8_t* target
        cdef size_t room
        if request.payload > STATUS_PAYLOAD_LIMIT:
            return self.begin_skip(size, WRONG_SHAPE)
        if self.inbox.available() < size + request.payload:
            return False
        target = self.outlet.reserve(STATUS_ROOM)  # once: the budget, and with it the answer, may change at any moment
        if target == NULL:
            return False
        if request.flags & PAYLOAD_LEN:
            verdict = choose_contexts(self.inbox.front() + size, request.payload, &self.contexts, request, &chosen)
            if verdict == OK:  # now its effect length is known, and is judged as if it stood in the header
                request.flags &= ~PAYLOAD_LEN
                verdict = validate(request, &self.rules)
        self.inbox.taken += size + asked.payload
        if verdict != OK:
            self.refuse(&asked, verdict, self.started, NOT_AN_OFFSET)
            return True
        room = room_to_look(self.disk, &chosen)
        if room:
            self.start_look(&chosen, room)
            return True
        verdict = self.tell_status(request, &chosen, target)
        if verdict != OK:
            self.refuse(request, verdict, self.started, NOT_AN_OFFSET)
        else:
            count_done(self.counts, BLOCK_STATUS, request.length)
        return True

    # ---- payloads ----

    cdef bint begin_payload(self, int size) noexcept nogil:
        """A payload that does not fit the inbox: into a buffer of its own, or stored as it arrives."""
        cdef size_t ready
        cdef uint64_t length = self.request.payload
        cdef bint room = self.budget.take_payload(length)
        cdef Piece* payload = NULL
        if self.payload_bytes and (not room or self.payload_bytes + length > self.connection_limit):
            if room:
                self.budget.give_back(length)
            return False  # until payloads of our own are stored
        if room:
            payload = new_piece(length, length, self.budget)
            if payload == NULL:
                self.budget.give_back(length)
        if payload == NULL:
            self.header_size = size
            self.header_epoch = self.place.epoch
            memcpy(self.header, self.inbox.front(), size)
        self.inbox.taken += size
        self.remaining = length
        self.verdict = OK
        if payload == NULL:
            self.phase = APPLY
            if length > INLINE_LIMIT:
                self.turns.enter(&self.turn, length)
            return True
        ready = min(<uint64_t>self.inbox.available(), length)
        memcpy(payload.bytes, self.inbox.front(), ready)
        self.inbox.taken += ready
        self.remaining -= ready
        self.payload = payload
        self.phase = PAYLOAD
        storing_expect(&self.learnt, self.store_count > 0, self.started)
        if self.remaining:
            self.turns.hold(&self.turn, self.remaining)
        return True

    cdef bint waits_for_turn(self) noexcept nogil:
        """Nothing of the payload that is next is stored, or may be."""
        return self.phase == APPLY and not may_go_on(&self.turn)

    cdef void put_back(self) noexcept nogil:
        """A request that waits for its turn, and of which more is to come, is as one that was not begun: nothing was
        taken of its payload, and nobody reads on."""
        if not self.waits_for_turn() or self.inbox.available() >= self.remaining:
            return
        must(self.remaining == self.request.payload, b"nothing is stored of a payload that waits for its turn")
        self.turns.leave(&self.turn)
        self.inbox.put_back(self.header, self.header_size)
        self.requests -= 1
        self.place.epoch = self.header_epoch
        self.throttle.give_back(&self.place)
        self.phase = HEADER
        self.remaining = 0

    cdef bint begin_skip(self, int size, int verdict) noexcept nogil:
        """Refuse a request; the answer follows its payload, as a client expects that is still sending."""
        self.inbox.taken += size
        self.remaining = self.request.payload
        self.verdict = verdict
        self.phase = SKIP
        self.allowance -= COST_OF_REFUSAL
        return True

    cdef bint apply_payload(self) noexcept nogil:
        """Store what has come of a payload that has no buffer, whole blocks at a time."""
        cdef uint64_t size = min(<uint64_t>self.inbox.available(), self.remaining)
        cdef uint64_t offset = self.request.offset + self.request.length - self.remaining
        if not may_go_on(&self.turn):
            return False
        if self.allowance <= 0:
            self.later = True
            return False
        if size < self.remaining:
            size -= min(size, (offset + size) % BLOCK)
        if size == 0 and self.remaining:
            return False
        if self.verdict == OK:
            self.verdict = verdict_of(self.disk.c_write(offset, size, self.inbox.front()))
        self.allowance -= size
        self.inbox.taken += size
        self.remaining -= size
        turn_left(&self.turn.remaining, self.remaining)
        if self.remaining == 0:
            self.end_payload()
        return True

    cdef void end_payload(self) noexcept nogil:
        cdef Phase phase = self.phase
        cdef Piece* payload = self.payload
        self.phase = HEADER
        self.payload = NULL
        if phase == APPLY or phase == PAYLOAD:
            self.turns.leave(&self.turn)
        if phase == PAYLOAD:
            if payload.size > INLINE_LIMIT and storing_beside(&self.learnt, self.workers.idle()):
                self.start_store(payload)
            else:
                self.start_job(STEPS, payload)
        elif self.verdict == OK:
            self.conclude(&self.request)
        else:
            self.refuse(&self.request, self.verdict, self.started, NOT_AN_OFFSET)
