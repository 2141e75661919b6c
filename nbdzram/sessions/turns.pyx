"""Large payloads while memory is short: who may store one as it arrives, and who is cut for not sending.

When the budget has no room for a large WRITE's payload, it can only be stored as it comes. If everyone did so at once,
clients that stop half-way would fill the pool with halves of their payloads, without limit. So only payloads of
STORED_LIMIT bytes together do so, the shortest first; the others wait in their sockets. While somebody waits, whoever
is in the middle of a payload, with a buffer or with a turn, must keep sending, or is cut. What that costs and saves, in
numbers: docs/decisions/0009-take-turns-when-memory-is-short.md.

    hold  -> BUFFERED --.
    enter -> WAITING -> ADMITTED -> leave (complete, or gone) -> whose turn is it now?

Any thread; one mutex, under which nothing but this list is walked.
"""

from libc.stdint cimport uint64_t

from nbdzram.sessions.mail cimport bell_ring
from nbdzram.sessions.wishes cimport EXPEL, GO_ON

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef enum:
    STORED = 16 << 20   # bytes of payloads that are stored as they arrive, together; a longer one has its turn alone
    PACE = 5            # calls of `watch`, one a second, in which a payload must grow by PACE_SIZE, while others wait
    PACE_SIZE = 512 << 10   # 0.8 Mbit/s: slower than any link that a disk is attached over

STORED_LIMIT = STORED
PACE_SECONDS = PACE
PACE_BYTES = PACE_SIZE


cdef class Turns:
    """One a server."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    @property
    def waiting(self):
        """Clients that nobody reads until their turn comes."""
        pthread_mutex_lock(&self.mutex)
        count = self._waiting()
        pthread_mutex_unlock(&self.mutex)
        return count

    def watch(self):
        """Once a second: cut who keeps others waiting and sends too little."""
        cdef Turn* turn
        cdef uint64_t remaining, sent
        cdef int waiting
        pthread_mutex_lock(&self.mutex)
        self.seconds += 1
        waiting = self._waiting()
        if waiting == 0 or self.seconds >= PACE:
            turn = self.first
            while turn != NULL:
                if turn.state != WAITING:
                    remaining = turn_rest(&turn.remaining)
                    sent = turn.watched - remaining if turn.watched >= remaining else PACE_SIZE  # another payload began
                    if waiting and turn.is_watched and sent < PACE_SIZE:
                        turn.sent = sent
                        turn_set(&turn.too_slow, True)
                        bell_ring(turn.bell, EXPEL)
                    turn.watched = remaining
                    turn.is_watched = True
                turn = turn.next
            self.seconds = 0
        pthread_mutex_unlock(&self.mutex)

    cdef void hold(self, Turn* turn, uint64_t size) noexcept nogil:
        """Its payload has a buffer."""
        pthread_mutex_lock(&self.mutex)
        self._link(turn, BUFFERED, size)
        pthread_mutex_unlock(&self.mutex)

    cdef void enter(self, Turn* turn, uint64_t size) noexcept nogil:
        """Its payload of `size` bytes has no buffer."""
        pthread_mutex_lock(&self.mutex)
        self._link(turn, WAITING, size)
        self._admit(turn)
        pthread_mutex_unlock(&self.mutex)

    cdef void leave(self, Turn* turn) noexcept nogil:
        """Its payload is complete, or it is gone; nothing happens if it neither entered nor holds a buffer."""
        cdef bint was_admitted
        if turn.state == NO_TURN:
            return
        pthread_mutex_lock(&self.mutex)
        was_admitted = turn.state == ADMITTED
        if turn.before == NULL:
            self.first = turn.next
        else:
            turn.before.next = turn.next
        if turn.next != NULL:
            turn.next.before = turn.before
        turn_set(&turn.state, NO_TURN)
        turn_set(&turn.too_slow, False)
        if was_admitted:
            self._admit(NULL)
        pthread_mutex_unlock(&self.mutex)

    cdef void _link(self, Turn* turn, int state, uint64_t size) noexcept nogil:
        turn.size = size
        turn.remaining = size
        turn.is_watched = False
        turn.arrival = self.arrivals
        self.arrivals += 1
        turn.before = NULL
        turn.next = self.first
        if self.first != NULL:
            self.first.before = turn
        self.first = turn
        turn_set(&turn.state, state)

    cdef void _admit(self, Turn* newcomer) noexcept nogil:
        """Let the shortest go on as long as there is room; a newcomer goes on by itself."""
        cdef Turn* turn
        cdef Turn* shortest
        cdef uint64_t admitted
        while True:
            turn = self.first
            shortest = NULL
            admitted = 0
            while turn != NULL:
                if turn.state == ADMITTED:
                    admitted += turn.size
                elif turn.state == WAITING and (
                    shortest == NULL or turn.size < shortest.size
                    or turn.size == shortest.size and turn.arrival < shortest.arrival
                ):
                    shortest = turn
                turn = turn.next
            if shortest == NULL or (admitted and admitted + shortest.size > STORED):
                return
            turn_set(&shortest.state, ADMITTED)
            if shortest != newcomer:
                bell_ring(shortest.bell, GO_ON)

    cdef int _waiting(self) noexcept nogil:
        cdef int count = 0
        cdef Turn* turn = self.first
        while turn != NULL:
            count += turn.state == WAITING
            turn = turn.next
        return count
