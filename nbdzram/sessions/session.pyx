"""One attached client: bytes in, engine, answers out. Knows no socket, no thread and no interpreter.

Its thread calls it (thread.pyx): bytes came, the peer reads again, somebody rang. Each call is a turn: every complete
request in the inbox is validated, performed and answered, and the answers leave with one send; who asks for more than
TURN at once goes on when others had theirs. Requests are taken in their order. One that is long goes on over several
turns, as the Job, and what follows it waits; but for large WRITEs, which workers store where that is quicker
(storing.pxd).

How a session ends is told by its Stage (session.pxd).

Invariants
1. Everything here runs on the thread that the session belongs to; workers see Tasks only, and Turns the Turn.
2. A request is either not yet taken from the inbox, or the Job, or a Store, or waits for a sync, or is answered: never
   two of these. One whose payload waits for room is put back into the inbox when the session is to end.
3. While the outlet is blocked (the peer does not read) nothing new is performed. A session then holds at most the
   inbox, one scratch of answers and one reply that may not be cut, all charged to the Budget. When that is used up,
   READs go on in steps of SMALL_STEP: who reads its replies is served, who does not holds one step.
4. A WRITE changes nothing before its payload is complete, except in phase APPLY.
5. In stage DRAINING every request that came completely is performed and answered, and none other: who connects again
   and asks again for what was not answered sees no error (QEMU's reconnect-delay, libnbd's reopening).
6. Released, it ends between two requests, with every answer sent, and its line stays open: whoever goes on begins with
   what came of the next request.
7. It is told GONE only when no Task of it is under way and it waits for no sync: until then its disk is in use.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from nbdzram.engine.disk cimport Disk
from nbdzram.engine.must cimport must
from nbdzram.sessions.answers cimport UNFRAGMENTED
from nbdzram.sessions.block_status cimport CONTEXTS
from nbdzram.sessions.budget cimport Budget, free_piece
from nbdzram.sessions.costs cimport STORE_LIMIT, TURN
from nbdzram.sessions.inbox cimport Inbox
from nbdzram.sessions.line cimport BROKEN, WATCH_READ, WATCH_WRITE, Line
from nbdzram.sessions.mail cimport bell_answer, bell_ring
from nbdzram.sessions.notices cimport Notices
from nbdzram.sessions.outlet cimport Outlet
from nbdzram.sessions.requests cimport APPLY, HEADER, PAYLOAD, SKIP, Requests
from nbdzram.sessions.stage cimport (
    CLOSING, CUT, DRAINING, HALTED, LEFT, LINE_BROKE, LOST, NO_MEMORY, NOT_ENDING, OPEN, TOO_SLOW, Ending,
)
from nbdzram.sessions.storing cimport storing_begin
from nbdzram.sessions.tally cimport Tally, count_times, monotonic
from nbdzram.sessions.throttle cimport Throttle
from nbdzram.sessions.turns cimport Turns, is_too_slow, may_go_on, turn_left
from nbdzram.sessions.wishes cimport ABORT, ATTACH, BURIED, BURY, DRAIN, EXPEL, GO_ON, RELEASE, SYNC, SYNCED
from nbdzram.sessions.work cimport NONE
from nbdzram.sessions.workers cimport Task, Workers

cdef uint64_t LINGER_NS = 5000000000  # how long a closed connection may take for its last replies before it is cut


cdef class Session(Requests):
    """See the module's docstring."""

    def __init__(self, *, uint64_t number, Disk disk not None, Tally tally not None, Line line not None,
                 Budget budget not None, Workers workers not None, Turns turns not None, Notices notices not None,
                 Throttle throttle not None, int style, bint read_only, contexts, uint64_t payload_limit,
                 uint64_t connection_limit, bint syncs, bytes greeting not None, bytes rest not None):
        cdef int index
        self.number = number
        self.disk = disk
        self.tally = tally
        self.budget = budget
        self.workers = workers
        self.turns = turns
        self.throttle = throttle
        storing_begin(&self.learnt)
        self.notices = notices
        self.line = line
        self.inbox = Inbox(budget)
        self.outlet = Outlet(line, budget)
        self.rules.size = disk.size
        self.rules.style = style
        self.rules.read_only = read_only
        self.rules.payload_limit = payload_limit
        self.rules.unfragmented_limit = UNFRAGMENTED
        self.rules.context_count = self.contexts.count = len(contexts)
        assert self.contexts.count <= CONTEXTS
        for index in range(self.contexts.count):
            self.contexts.ids[index] = contexts[index]
        self.connection_limit = connection_limit
        self.syncs = syncs
        self.kept = (greeting, rest)
        self.greeting_at, self.greeting_size = <const uint8_t*>PyBytes_AS_STRING(greeting), PyBytes_GET_SIZE(greeting)
        self.rest_at, self.rest_size = <const uint8_t*>PyBytes_AS_STRING(rest), PyBytes_GET_SIZE(rest)
        self.started = monotonic()
        self.turn.bell = &self.bell

    def __dealloc__(self):
        free(self.kept_bytes)

    def take_rest(self):
        cdef bytes rest = self.kept_bytes[:self.kept_size]
        free(self.kept_bytes)
        self.kept_bytes, self.kept_size = NULL, 0
        return rest

    @property
    def midway(self):
        """The peer has begun a request and not finished it; had, when it is lost."""
        return self.was_midway if self.stage_now >= LOST else self.phase != HEADER or self.inbox.available() > 0

    @property
    def waits_for_peer(self):
        """The rest of a payload is to come, be it of a request that is refused, or answers are not read."""
        return self.stage_now < LOST and (
            self.phase == PAYLOAD or self.phase == SKIP or self.phase == APPLY and may_go_on(&self.turn)
            or self.outlet.blocked()
        )

    @property
    def waits_for_room(self):
        """Memory is short, and nothing is read of a payload before those of others are stored."""
        return self.stage_now < LOST and self.waits_for_turn()

    @property
    def payload_remaining(self):
        """Bytes still to come of the payload that is arriving."""
        return self.remaining

    # ---- what the thread calls ----

    cdef void begin(self) noexcept nogil:
        """Take over from the handshake: send its last reply, and understand what came behind it."""
        self.outlet.scratch = self.scratch
        if not self.inbox.open(self.rest_size):
            self.cut(NO_MEMORY, 0)
            return
        memcpy(self.inbox.bytes, self.rest_at, self.rest_size)
        self.inbox.filled = self.rest_size
        self.outlet.put(self.greeting_at, self.greeting_size)
        self.run()

    cdef void readable(self) noexcept nogil:
        """The line has bytes, or its end."""
        cdef ssize_t came
        cdef size_t room
        self.unread = False
        if self.stage_now != OPEN or self.waits_for_turn():
            self.settle()  # a line that says how it ends, perhaps, to a peer that is gone; or it was told of before
            return
        if self.phase == PAYLOAD:
            room = min(self.remaining, <uint64_t>TURN)
            came = self.line.take(self.payload.bytes + (self.payload.size - self.remaining), room)
        else:
            room = self.inbox.room()
            if room == 0:
                self.settle()
                return
            came = self.line.take(self.inbox.bytes + self.inbox.filled, room)
        if came > 0:
            self.arrived(came)
        elif came == 0:
            self.hung_up()
        elif came == BROKEN:
            self.broke(self.line.error)
        else:
            self.settle()

    cdef void arrived(self, size_t size) noexcept nogil:
        """`size` bytes came. What is complete is performed and answered before this returns, as far as our turn
        goes."""
        cdef bint in_payload = self.phase == PAYLOAD
        if self.stage_now != OPEN:
            return
        if in_payload:
            must(size <= self.remaining, b"no more comes into a payload's buffer than it has room for")
            self.remaining -= size
            turn_left(&self.turn.remaining, self.remaining)
        else:
            self.inbox.filled += size
            must(self.inbox.filled <= self.inbox.size, b"no more comes into an inbox than it has room for")
            self.inbox.rested = False
        if self.later and self.phase == HEADER:
            self.settle()  # our turn is over
        else:
            self.run()
        if in_payload:
            self.allowance -= size  # to take it was work; what comes into the inbox is charged as it is understood

    cdef void writable(self) noexcept nogil:
        """The peer reads again."""
        if self.stage_now >= LOST:
            return
        self.outlet.drain()
        if self.outlet.blocked():
            self.started = monotonic()  # it took some: it does not stand still
            self.settle()
        else:
            self.run()

    cdef void go_on(self) noexcept nogil:
        """The next turn: something is there to be done, or what held us up is gone."""
        if self.stage_now < LOST:
            self.run()
        if self.unread and not self.later:
            self.readable()

    cdef void answer_bell(self) noexcept nogil:
        """Do what was wished. BURY comes last of all wishes, and after its answer nobody may touch us any more."""
        cdef int wishes = bell_answer(&self.bell)
        if wishes & ATTACH:
            self.begin()
        if wishes & SYNCED:
            self.answer_synced()
            self.go_on()
        if self.stage_now < LOST:
            if wishes & EXPEL and is_too_slow(&self.turn):  # it may have sent the rest meanwhile
                self.cut(TOO_SLOW, self.turn.sent)
            elif wishes & ABORT:
                self.cut(CUT, 0)
            else:
                self.hurried = self.hurried or wishes & (RELEASE | DRAIN) != 0
                if wishes & RELEASE:
                    self.release()
                if wishes & DRAIN:
                    self.drain()
                if wishes & GO_ON:
                    self.go_on()
        if wishes & BURY:
            bell_ring(&self.tidings, BURIED)

    cdef void welcome(self, Task* task) noexcept nogil:
        """A part of a large WRITE was stored, or not."""
        self.take_home(task)
        self.go_on()

    cdef void round(self) noexcept nogil:
        """Called once a second: give back what a quiet session does not need, and wait no longer for who never
        reads."""
        if self.stage_now < LOST:
            self.inbox.rest()
        if self.stage_now == CLOSING and monotonic() - self.closing_since > LINGER_NS:
            self.lose(False)

    cdef void hung_up(self) noexcept nogil:
        """The peer sends no more. What it asked for completely is still answered."""
        if self.stage_now >= LOST:  # perhaps GONE, and then nobody listens to what we tell
            return
        self.left = True
        self.end(LEFT, 0)
        self.drain()

    cdef void broke(self, int error) noexcept nogil:
        """The line is gone."""
        if self.stage_now < LOST:
            self.end(self.line.cause or LINE_BROKE, error)
            self.lose(False)

    cdef bint may_go(self) noexcept nogil:
        """Is nothing of ours under way any more?"""
        return self.stage_now == LOST and not self.busy()

    # ---- how it ends ----

    cdef void drain(self) noexcept nogil:
        """Read no more; perform and answer what was asked for completely."""
        self.put_back()
        if self.move(DRAINING) or self.throttled:
            self.run()

    cdef void release(self) noexcept nogil:
        """As drain, once the payload that is arriving is there; and the line is not closed then. One that waits for its
        turn is not waited for: it would come when all are gone that are before it."""
        self.releasing = True
        self.put_back()
        if self.stage_now == OPEN or self.throttled:
            self.run()

    cdef void let_go(self) noexcept nogil:
        """Nothing is asked for that was not answered: the line is whoever's takes it."""
        self.kept_size = self.inbox.available()
        if self.kept_size:
            self.kept_bytes = <uint8_t*>malloc(self.kept_size)
            if self.kept_bytes == NULL:
                self.kept_size = 0
                self.cut(NO_MEMORY, 0)
                return
            memcpy(self.kept_bytes, self.inbox.front(), self.kept_size)
        self.line.watch(0)
        self.released = True
        self.lose(True)

    cdef void cut(self, Ending cause, int64_t value) noexcept nogil:
        """End at once."""
        self.end(cause, value)
        self.lose(False)

    cdef void lose(self, bint orderly) noexcept nogil:
        """Nothing is sent any more, and nothing held but what the workers work on."""
        if self.stage_now >= LOST:
            return
        self.was_midway = not self.released and (self.phase != HEADER or self.inbox.available() > 0)
        self.move(LOST)
        self.unread = self.throttled = False
        if self.unsynced != NULL:
            bell_ring(&self.tidings, SYNC)  # nobody is to be answered: not to wait for it, which may take for ever
        self.throttle.give_back(&self.place)
        if not self.released:
            self.line.hang_up(orderly)
        self.outlet.close()
        self.turns.leave(&self.turn)
        free_piece(self.payload, self.budget)
        self.payload = NULL
        self.drop_work()
        self.inbox.close()

    # ---- the loop over requests ----

    cdef void run(self) noexcept nogil:
        cdef int64_t early
        self.later = self.throttled = False
        self.started = monotonic()
        self.allowance = early = TURN
        while self.advance():
            # So that the client and we are at work at the same time.
            if self.scratch.alone and early - self.allowance >= self.scratch.early:
                self.outlet.send_ahead()
                early = self.allowance
        self.outlet.flush()
        if self.counts.untimed_any:
            count_times(self.counts, monotonic() - self.started)
        self.settle()

    # ---- when to read, when to end ----

    cdef void settle(self) noexcept nogil:
        """Read on only while there is something we could do with it; end when there is nothing left to do."""
        cdef int error, wanted
        if self.stage_now >= LOST:
            return
        if self.outlet.broken:
            self.cut(LINE_BROKE if self.line.error else NO_MEMORY, self.line.error)
            return
        if self.inbox.taken and self.inbox.filled == self.inbox.size and not self.outlet.blocked():
            self.inbox.grow(self.inbox.size + 1)  # one read filled it: a busy connection
        if self.releasing and self.phase == HEADER:
            self.move(DRAINING)
        if self.stage_now != OPEN and self.spent() and self.move(CLOSING):
            self.closing_since = monotonic()
        if self.stage_now == CLOSING and not self.outlet.blocked() and self.at_rest():
            self.let_go()
            return
        if self.stage_now == CLOSING and not self.outlet.blocked() and self.line.finish():
            self.lose(True)
            return
        wanted = self.wanted()
        self.unread = self.line.more and wanted & WATCH_READ != 0
        error = self.line.watch(wanted)
        if error:
            self.cut(LINE_BROKE, error)

    cdef bint at_rest(self) noexcept nogil:
        """To be released, between two requests, and nothing else ends it."""
        return self.releasing and self.phase == HEADER and self.ending == NOT_ENDING

    cdef int wanted(self) noexcept nogil:
        cdef int wanted = WATCH_WRITE if self.outlet.blocked() or self.stage_now == CLOSING else 0
        if self.stage_now != OPEN or self.outlet.blocked() or self.job.way != NONE:
            return wanted
        if self.phase == APPLY and not may_go_on(&self.turn):
            return wanted
        if self.phase == HEADER and (
            self.store_count + self.unsynced_count >= STORE_LIMIT or self.inbox.available() == self.inbox.size
        ):
            return wanted
        return wanted | WATCH_READ

    cdef bint spent(self) noexcept nogil:
        """Nothing is under way, and nothing that came can still be performed."""
        if self.busy() or self.job.way != NONE:
            return False
        if self.stage_now >= HALTED:
            return True
        if self.phase == APPLY and not may_go_on(&self.turn):
            return False
        return not self.later and not self.throttled and (not self.outlet.blocked() or self.inbox.available() == 0)
