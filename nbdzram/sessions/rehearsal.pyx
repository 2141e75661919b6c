"""A line whose peer is a script: what tests and the simulator put in the place of a socket.

No thread and no system call: a Desk that nobody waits at serves the sessions, and the test says what happens when.
"""

from libc.errno cimport ECONNRESET
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_FromStringAndSize

from nbdzram.sessions.epoll cimport EPOLLIN
from nbdzram.sessions.line cimport BROKEN, LATER, WATCH_READ, WATCH_WRITE, Line
from nbdzram.sessions.patience cimport (
    LOOK, NAP, SLEEP, Patience, patience_bar, patience_learn, patience_pause, patience_way,
)
from nbdzram.sessions.session cimport Session
from nbdzram.sessions.storing cimport Storing, storing_begin, storing_beside, storing_expect, storing_learn
from nbdzram.sessions.thread cimport Desk
from nbdzram.sessions.tally cimport monotonic
from nbdzram.sessions.throttle cimport (
    Rate, Throttle, rate_due, rate_grant, rate_is_scarce, rate_of_bytes, rate_of_requests, rate_take_back,
)
from nbdzram.sessions.workers cimport Workers


cdef class RehearsalLine(Line):
    """`incoming` is what the peer has sent, `outgoing` what it was given, `room` how much more it takes."""

    cdef public bytearray incoming
    cdef public bytearray outgoing
    cdef public size_t room
    cdef public size_t piece       # the most bytes that one take gives
    cdef public bint sends_no_more
    cdef public bint reset
    cdef public bint untold        # what comes is held by the line: no poller tells of it once it was told of the first
    cdef public bint mute          # there is no room for what a line says at its end
    cdef readonly list gifts       # sizes of what it was given
    cdef readonly bint closed
    cdef readonly bint closed_in_order
    cdef readonly int watched

    @property
    def record(self):
        return self.grain

    @record.setter
    def record(self, size_t size):
        self.grain = size

    def __init__(self):
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.gifts = []
        self.room = self.piece = <size_t>1 << 40

    @property
    def ready(self):
        """A poller would wake the session for it."""
        if self.closed:
            return False
        if self.watched & WATCH_WRITE and (self.room and not self.mute or self.reset):
            return True
        if self.more:  # all that was sent is in here already
            return False
        return self.watched & WATCH_READ != 0 and (len(self.incoming) > 0 or self.sends_no_more or self.reset)

    cdef ssize_t take(self, uint8_t* target, size_t size) noexcept nogil:
        with gil:
            assert size, "an empty receive buffer"
            if self.reset:
                self.error = ECONNRESET
                return BROKEN
            size = min(size, min(<size_t>len(self.incoming), self.piece))
            if size == 0:
                self.more = False
                return 0 if self.sends_no_more else LATER
            memcpy(target, PyByteArray_AS_STRING(self.incoming), size)
            del self.incoming[:size]
            self.more = self.untold and (len(self.incoming) > 0 or self.sends_no_more)
            return size

    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil:
        with gil:
            if self.reset:
                self.error = ECONNRESET
                return BROKEN
            assert not self.closed, "sent behind the end"
            size = min(size, self.room)
            if size == 0:
                return LATER
            self.outgoing += PyBytes_FromStringAndSize(<const char*>source, size)
            self.room -= size
            self.gifts.append(size)
            return size

    cdef int watch(self, int wanted) noexcept nogil:
        self.watched = wanted
        return 0

    cdef bint finish(self) noexcept nogil:
        return not self.mute or self.reset

    cdef void hang_up(self, bint orderly) noexcept nogil:
        self.closed = True
        self.closed_in_order = orderly
        self.watched = 0


def serve(Desk desk not None, Session session not None, *, bint alone=False, way="sleep"):
    """What a poller's word does: bytes came, or the peer reads again; of this session `alone`, or of others too. It was
    waited for in this way."""
    desk.scratch.alone = alone
    desk.expect(WAITING[way])
    desk.meet(session, EPOLLIN)
    desk.again()


def age(Session session not None, int seconds):
    """Let so many seconds have gone by since it began to close."""
    session.closing_since -= <uint64_t>seconds * 1000000000


def pass_time(Desk desk not None, Throttle throttle not None, uint64_t nanoseconds):
    """Let so much time have gone by in an export's schedule, for the sessions that wait at the desk too."""
    cdef void* session = desk.first_held
    throttle.requests.until -= min(throttle.requests.until, nanoseconds)
    throttle.traffic.until -= min(throttle.traffic.until, nanoseconds)
    while session != NULL:
        (<Session>session).place.due -= min((<Session>session).place.due, nanoseconds)
        (<Session>session).place.taken -= min((<Session>session).place.taken, nanoseconds)
        session = (<Session>session).next_held
    desk.next_due -= min(desk.next_due, nanoseconds)
    if desk.next_due <= monotonic():
        desk.next_due = 0  # what is due now makes the desk's owner come back
    desk.again()


cdef class Schedule:
    """One limit, by a clock of the test's own."""

    cdef Rate rate

    def __init__(self, per_second, burst, *, bint of_bytes=False):
        self.rate = rate_of_bytes(per_second, burst, 1) if of_bytes else rate_of_requests(per_second, burst, 1)

    def take(self, uint64_t amount, uint64_t now):
        """When a request may begin that is there now."""
        cdef uint64_t due = max(now, rate_due(&self.rate))
        rate_grant(&self.rate, amount, due)
        return due

    def take_back(self, uint64_t amount):
        """It does not begin."""
        rate_take_back(&self.rate, amount)

    def is_scarce(self, uint64_t now):
        """Is half of the burst used up?"""
        return rate_is_scarce(&self.rate, now)


def rest(Desk desk not None, Session session not None):
    """What a second does."""
    session.round()
    desk.after(session)
    desk.again()


WAITING = {"sleep": SLEEP, "nap": NAP, "look": LOOK}
NAMES = {way: name for name, way in WAITING.items()}


cdef class Waits:
    """A thread's patience, with waits that the test makes up, on a clock of its own: nanoseconds since the first."""

    cdef Patience patience
    cdef readonly uint64_t now

    def __cinit__(self):
        self.now = 1

    def way(self):
        """How would it wait?"""
        return NAMES[patience_way(&self.patience, self.now)]

    def waited(self, uint64_t nanoseconds, *, way="sleep", uint64_t served=1, uint64_t work=0, bint vain=False):
        """A turn of so many requests, that took so long; the next came after so long. `vain`: behind its nap."""
        self.now += work + nanoseconds
        patience_learn(&self.patience, WAITING[way], vain, nanoseconds, served, self.now)

    def passes(self, uint64_t nanoseconds):
        """Time, with no request."""
        self.now += nanoseconds

    def pause(self):
        """Something else decides when it goes on."""
        patience_pause(&self.patience)

    def bar(self, uint64_t nanoseconds):
        """Somebody else ran on its processor for so long."""
        patience_bar(&self.patience, nanoseconds, self.now)


cdef class Looks:
    """I/O threads that look before they sleep, or are at work, on some processors."""

    cdef Workers workers

    def __init__(self, Workers workers not None):
        self.workers = workers

    def begins(self):
        """May one more look?"""
        return self.workers.may_look()

    def ends(self):
        """One of them looks no more."""
        self.workers.looked()

    def works(self, int threads):
        """So many more are in a turn, or fewer."""
        while threads > 0:
            self.workers.begin()
            threads -= 1
        while threads < 0:
            self.workers.end()
            threads += 1


cdef class Stores:
    """What a session learns of its large WRITEs, each so long as the test says, on a clock of its own: nanoseconds."""

    cdef Storing learnt
    cdef readonly uint64_t now

    def __cinit__(self):
        self.now = 1
        storing_begin(&self.learnt)

    def store(self, uint64_t length, *, uint64_t here, uint64_t beside, uint64_t pause=0, bint idle=True):
        """One more comes, `pause` after the last: whether the workers store it."""
        cdef bint hop
        self.now += pause
        storing_expect(&self.learnt, False, self.now)
        hop = storing_beside(&self.learnt, idle)
        self.now += beside if hop else here
        storing_learn(&self.learnt, hop, length, self.now)
        return hop


def delay(Session session not None, uint64_t nanoseconds):
    """Let the large WRITE that is under way take so much longer."""
    session.learnt.began -= nanoseconds


def let_pause(Session session not None, uint64_t nanoseconds):
    """Let so much time have gone by since its last large WRITE."""
    session.learnt.began -= nanoseconds
    session.learnt.last -= nanoseconds
