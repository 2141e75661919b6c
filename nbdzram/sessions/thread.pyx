"""A thread of the data plane: one poller, the sessions that it serves, no interpreter lock, ever.

    wait ─> lines that are ready ─> mail ─> a spell of the queue ─> wait, or not at all while somebody is in it

Who asks for little (a machine that swaps, one request at a time) is served as soon as the poller tells of it. Whose
last turn was long, and who has more to do than one turn allows, waits in the queue; between two spells of it the poller
is asked again, so that the one waits for a few turns of the other, however many they are.

A Desk is all of that but the waiting: tests serve sessions at one of their own, without a thread.

Invariants
1. A session is served by the desk that it was mailed to, from ATTACH to BURY, and touched by nobody else but for its
   two bells, its turn, its tasks, and the counters that others may read.
2. Each spell serves at least one of the queue and ends at SPELL; who is served goes to its end, if at all. So everybody
   in it has a turn after one of each other, and at most READY short ones are served between two spells.
"""

import threading

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from nbdzram.engine.must cimport must
from nbdzram.sessions.costs cimport EARLY, EARLY_NAPPING, TURN
from nbdzram.sessions.epoll cimport (
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLERR, EPOLLHUP, EPOLLIN, epoll_create1, epoll_ctl, epoll_event, epoll_wait,
)
from nbdzram.sessions.mail cimport (
    ROUND, STORED, WISH, Letter, bell_answer, bell_hang, bell_ring, mail_close, mail_open, mail_quiet, mail_take,
    mail_waits,
)
from nbdzram.sessions.outlet cimport SCRATCH_SIZE
from nbdzram.sessions.patience cimport (
    LOOK, LOOK_NS, NAP, NAP_NS, SLEEP, STOLEN_NS, patience_bar, patience_be_exact, patience_learn, patience_nap,
    patience_pause, patience_way,
)
from nbdzram.sessions.requests cimport PAYLOAD
from nbdzram.sessions.session cimport Session
from nbdzram.sessions.stage cimport GONE, LOST
from nbdzram.sessions.tally cimport monotonic
from nbdzram.sessions.throttle cimport poll_until
from nbdzram.sessions.wishes cimport GONE_NOW
from nbdzram.sessions.work cimport Store
from nbdzram.sessions.workers cimport Task, Workers

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int)

cdef extern from * nogil:
    """
    static inline void counter_add(uint64_t* counter, uint64_t by) {  /* one writer */
        __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + by, __ATOMIC_RELAXED);
    }
    static inline void counter_raise(uint64_t* counter, uint64_t to) {
        if (to > __atomic_load_n(counter, __ATOMIC_RELAXED)) __atomic_store_n(counter, to, __ATOMIC_RELAXED);
    }
    static inline uint64_t counter_read(uint64_t* counter) { return __atomic_load_n(counter, __ATOMIC_RELAXED); }
    static inline uint64_t counter_reset(uint64_t* counter) {
        return __atomic_exchange_n(counter, 0, __ATOMIC_RELAXED);
    }
    """
    void counter_add(uint64_t* counter, uint64_t by)
    void counter_raise(uint64_t* counter, uint64_t to)
    uint64_t counter_read(uint64_t* counter)
    uint64_t counter_reset(uint64_t* counter)

cdef enum:
    READY = 64            # lines that one wait tells of
    SHORT = 64 << 10      # of `cost` (costs.pxd), a turn: one request that is done at once, or sixteen of a block
    SPELL = 128 << 10     # of `cost`, of the queue: some 50 microseconds, of which asking the poller takes one
    FOR_EVER = -1


cdef class Desk:
    """See the module's docstring."""

    def __cinit__(self, int number, Workers workers not None):
        cdef int error
        self.poller = self.box.event = -1
        self.number = number
        self.workers = workers
        error = mail_open(&self.box)
        if error:
            raise OSError(error, "eventfd")
        bell_hang(&self.bell, &self.box, ROUND, NULL)
        self.scratch.bytes = <uint8_t*>malloc(SCRATCH_SIZE)
        if self.scratch.bytes == NULL:
            raise MemoryError("no memory for a thread's answers")
        self.expect(SLEEP)

    def __dealloc__(self):
        mail_close(&self.box)
        free(self.scratch.bytes)

    def fileno(self):
        """Readable when there is mail."""
        return self.box.event

    def busy_seconds(self):
        """Spent in turns, since the start."""
        return counter_read(&self.busy_ns) / 1e9

    def longest_turn_seconds(self):
        """The longest turn since this was last asked."""
        return counter_reset(&self.longest_ns) / 1e9

    def turn(self):
        """For a desk that nobody waits at: what mail and turns are there to be seen to."""
        cdef uint64_t began = self.begin_turn()
        mail_quiet(&self.box)
        self.take_mail()
        self.let_on()
        self.take_turns()
        self.again()
        self.end_turn(began)

    cdef void again(self) noexcept nogil:
        """Nobody waits at this desk: mail makes its owner come back to who has more to do."""
        if self.first_ready != NULL or self.first_held != NULL and self.next_due == 0:
            bell_ring(&self.bell, AGAIN)

    cdef void expect(self, int way) noexcept nogil:
        """In this way more is waited for: that says how much a client has to do meanwhile."""
        self.scratch.early = EARLY_NAPPING if way == NAP else EARLY

    cdef uint64_t begin_turn(self) noexcept nogil:
        """Be counted among who is at work; the time."""
        self.workers.begin()
        return monotonic()

    cdef void end_turn(self, uint64_t began) noexcept nogil:
        cdef uint64_t now = monotonic()
        self.workers.end()
        counter_add(&self.busy_ns, now - began)
        counter_raise(&self.longest_ns, now - began)

    cdef void take_mail(self) noexcept nogil:
        """Open every letter that is there."""
        cdef Letter* letter = mail_take(&self.box) if mail_waits(&self.box) else NULL
        cdef Letter* following
        cdef void* session
        cdef bint gone
        while letter != NULL:
            following = letter.next
            if letter.kind == WISH:
                if not (<Session>letter.owner).linked and (<Session>letter.owner).stage_now < LOST:
                    self.admit(<Session>letter.owner)
                session = letter.owner
                gone = (<Session>session).stage_now == GONE
                (<Session>session).answer_bell()
                if not gone:  # who was may be no more
                    self.after(<Session>session)
            elif letter.kind == STORED:
                session = (<Store*>(<Task*>letter.owner).store).session
                (<Session>session).welcome(<Task*>letter.owner)
                self.after(<Session>session)
            else:
                self.rounds(bell_answer(&self.bell))
            letter = following

    cdef void rounds(self, uint32_t wishes) noexcept nogil:
        cdef void* session = self.first
        cdef void* following
        if wishes & REST:
            while session != NULL:
                following = (<Session>session).next
                (<Session>session).round()
                self.after(<Session>session)
                session = following
        if wishes & FINISH:
            self.finished = True

    cdef void take_turns(self) noexcept nogil:
        """A spell of the queue: once each at most of those that stand in it."""
        cdef void* last = self.last_ready
        cdef void* session = NULL
        cdef int64_t left = SPELL
        while left > 0 and session != last:
            session = self.first_ready
            self.first_ready = (<Session>session).next_ready
            if self.first_ready == NULL:
                self.last_ready = NULL
            (<Session>session).queued = False
            self.take_turn(<Session>session)
            left -= TURN - (<Session>session).allowance

    cdef void take_turn(self, Session session) noexcept nogil:
        """It has come to the head of the queue."""
        cdef uint32_t found = session.found
        session.found = 0
        if found and not session.later and session.stage_now < LOST:
            self.wake(session, found)
        else:  # the poller tells of its line again
            session.go_on()
            self.after(session)

    cdef void hold(self, Session session) noexcept nogil:
        """It goes on when its place is due (throttle.pyx)."""
        self.next_due = min(self.next_due, session.place.due) if self.first_held != NULL else session.place.due
        if session.held:
            return
        session.held = True
        session.next_held = NULL
        if self.first_held == NULL:
            self.first_held = <void*>session
        else:
            (<Session>self.last_held).next_held = <void*>session
        self.last_held = <void*>session

    cdef void let_on(self) noexcept nogil:
        """Serve those whose place is due, and forget those that wait no more."""
        cdef void* session = self.first_held
        cdef void* following
        cdef uint64_t now
        if session == NULL:
            return
        now = monotonic()
        if now < self.next_due:
            return
        self.first_held = self.last_held = NULL
        while session != NULL:
            following = (<Session>session).next_held
            (<Session>session).held = False
            if (<Session>session).throttled and (<Session>session).place.due <= now:
                (<Session>session).go_on()
            self.after(<Session>session)
            session = following

    cdef void admit(self, Session session) noexcept nogil:
        """It was mailed to us."""
        session.linked = True
        session.scratch = &self.scratch
        session.line.attend(self.poller, <void*>session)
        session.before = NULL
        session.next = self.first
        if self.first != NULL:
            (<Session>self.first).before = <void*>session
        self.first = <void*>session

    cdef void after(self, Session session) noexcept nogil:
        """After each call of a session: it may have more to do, or be gone."""
        session.heavy = TURN - session.allowance > SHORT or session.phase == PAYLOAD
        if (session.later or session.unread) and not session.queued:
            self.queue(session)
        if session.throttled:
            self.hold(session)
        elif session.held:
            self.next_due = 0  # it waits no more: let_on forgets it
        if session.linked and not session.queued and not session.held and session.may_go():
            self.part(session)

    cdef void queue(self, Session session) noexcept nogil:
        """It has its turn when those that stand there already had theirs."""
        session.queued = True
        session.next_ready = NULL
        if self.first_ready == NULL:
            self.first_ready = <void*>session
        else:
            (<Session>self.last_ready).next_ready = <void*>session
        self.last_ready = <void*>session

    cdef void meet(self, Session session, uint32_t found) noexcept nogil:
        """The poller tells of its line, and does so again for what is left there."""
        if session.queued or session.stage_now >= LOST:
            return
        if session.heavy and not self.scratch.alone:
            session.found = found
            self.queue(session)
        else:
            self.wake(session, found)

    cdef void wake(self, Session session, uint32_t found) noexcept nogil:
        """Its line has bytes, or room, or its end."""
        if found & (EPOLLIN | EPOLLHUP | EPOLLERR) and not session.outlet.blocked():
            session.readable()
        else:
            session.writable()
        self.after(session)

    cdef void part(self, Session session) noexcept nogil:
        """Nothing of it is under way any more: the event loop will have it buried."""
        must(not session.queued and not session.held, b"nobody is buried who stands in a queue of the thread")
        must(session.tasks == 0, b"nobody is buried whose content a worker still stores")
        if session.before == NULL:
            self.first = session.next
        else:
            (<Session>session.before).next = session.next
        if session.next != NULL:
            (<Session>session.next).before = session.before
        session.linked = False
        session.move(GONE)
        bell_ring(&session.tidings, GONE_NOW)


cdef class IoThread(Desk):
    """A desk with a poller and a thread of its own."""

    def __init__(self, int number, Workers workers not None):
        cdef epoll_event event
        self.poller = epoll_create1(EPOLL_CLOEXEC)
        event.events = EPOLLIN
        event.data.ptr = NULL  # the mailbox
        if self.poller < 0 or epoll_ctl(self.poller, EPOLL_CTL_ADD, self.box.event, &event) != 0:
            raise OSError(errno, "epoll")
        self.thread = threading.Thread(target=self._run, name=f"nbdzram-io-{number}", daemon=True)
        self.thread.start()

    def __dealloc__(self):
        if self.poller >= 0:
            c_close(self.poller)

    def stop(self):
        """End the thread. All its sessions are buried."""
        bell_ring(&self.bell, FINISH)
        self.thread.join()

    def _run(self):
        with nogil:
            patience_be_exact()
            self.serve()

    cdef void serve(self) noexcept nogil:
        cdef epoll_event events[READY]
        cdef uint64_t began
        cdef int count, index
        cdef void* session
        while not self.finished:
            count = self.wait(events)
            self.scratch.alone = count <= 1 and self.first_ready == NULL
            began = self.begin_turn()
            for index in range(max(count, 0)):
                session = events[index].data.ptr
                if session == NULL:
                    mail_quiet(&self.box)
                else:
                    self.meet(<Session>session, events[index].events)
            self.take_mail()
            self.let_on()
            self.take_turns()
            self.end_turn(began)

    cdef int wait(self, epoll_event* events) noexcept nogil:
        """How many lines are ready: at once while somebody has more to do, or else as soon as one is."""
        cdef uint64_t began, now, looked
        cdef uint64_t served
        cdef int way, count = 0
        cdef bint vain = False
        if self.first_ready != NULL:
            return epoll_wait(self.poller, events, READY, 0)
        served = self.scratch.served - self.served  # since the last wait, in however many turns
        self.served = self.scratch.served
        if self.first_held != NULL:
            patience_pause(&self.patience)
            poll_until(self.poller, self.next_due, monotonic())
            return epoll_wait(self.poller, events, READY, 0)
        began = now = monotonic()
        way = patience_way(&self.patience, began)
        if way == LOOK and not self.workers.may_look():
            way = SLEEP
        self.expect(way)
        if way == NAP:
            patience_nap(NAP_NS)
            count = epoll_wait(self.poller, events, READY, 0)
            vain = count == 0
            now = monotonic()
        elif way == LOOK:
            while count == 0 and now - began < LOOK_NS:
                looked = now
                count = epoll_wait(self.poller, events, READY, 0)
                now = monotonic()
                if now - looked > STOLEN_NS:
                    patience_bar(&self.patience, now - looked, now)
                    break
            self.workers.looked()
        if count == 0:
            count = epoll_wait(self.poller, events, READY, FOR_EVER)
            now = monotonic()
        if served:  # else what came was a part of a request, or mail
            patience_learn(&self.patience, way, vain, now - began, served, now)
        return count
