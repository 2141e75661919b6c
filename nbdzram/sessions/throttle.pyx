"""How much the clients of one export may ask for a second: requests, bytes, and how many of either at once.

    take ──> a place in the export's schedule, and when it is due ──> the request begins ──> the place is left
      └── the session is lost before: given back

Each limit is one number: `until`, when all that was granted will be worth its time. A request may begin once that is
less than a burst ahead of now, and moves it on by its own worth (the generic cell rate algorithm of ITU-T I.371, as a
virtual schedule). So a request of any size passes, and what it took beyond the burst is waited for behind it.

Invariants
1. In no time t more begins than a burst, and t times the rate; of bytes, and the rest of the one request that used the
   burst up.
2. Requests begin in the order in which their places were taken, and a session has one at most. Once half of a burst is
   used up, a session takes one in each of its turns. So an export's clients alternate, whichever threads serve them.
3. A place was taken under the limits of its epoch. When they change, its session takes another, and what was in debt is
   forgotten.

Any thread; one mutex, under which there is nothing but arithmetic. Of an export without limits nobody comes here: its
sessions look at `limited` and go on.
"""

from libc.stdint cimport uint64_t

from nbdzram.sessions.turns cimport pthread_mutex_t

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef uint64_t SECOND_NS = 1000000000
cdef uint64_t LONGEST_BURST_NS = 86400 * SECOND_NS  # a day's


cdef class Throttle:
    """One an export, for as long as that is offered."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def limit(self, requests, traffic, uint64_t seconds=1):
        cdef Rate of_requests = rate_of_requests(requests[0], requests[1], seconds)
        cdef Rate of_traffic = rate_of_bytes(traffic[0], traffic[1], seconds)
        pthread_mutex_lock(&self.mutex)
        if not (_is_same(&self.requests, &of_requests) and _is_same(&self.traffic, &of_traffic)):
            self.epoch += 1
            self.requests = of_requests
            self.traffic = of_traffic
            throttle_set(&self.limited, of_requests.per_span != 0 or of_traffic.per_span != 0)
        pthread_mutex_unlock(&self.mutex)

    cdef void take(self, Place* place, uint64_t size, uint64_t now) noexcept nogil:
        """A place for a request that moves `size` bytes, unless it has one under these limits."""
        cdef uint64_t due
        pthread_mutex_lock(&self.mutex)
        if place.epoch != self.epoch:
            place.taken = place.taken if place.epoch else now
            place.epoch = self.epoch
            place.size = size
            due = max(rate_due(&self.requests), rate_due(&self.traffic))
            place.scarce = rate_is_scarce(&self.requests, now) or rate_is_scarce(&self.traffic, now)
            place.due = max(now, due)
            rate_grant(&self.requests, 1, place.due)
            rate_grant(&self.traffic, size, place.due)
        pthread_mutex_unlock(&self.mutex)

    cdef void give_back(self, Place* place) noexcept nogil:
        """Nobody begins there."""
        pthread_mutex_lock(&self.mutex)
        if place.epoch == self.epoch:
            rate_take_back(&self.requests, 1)
            rate_take_back(&self.traffic, place.size)
        pthread_mutex_unlock(&self.mutex)
        place.epoch = 0


cdef bint _is_same(const Rate* one, const Rate* other) noexcept nogil:
    return one.per_span == other.per_span and one.span_ns == other.span_ns and one.burst_ns == other.burst_ns


cdef Rate rate_of_requests(uint64_t per_span, burst, uint64_t seconds):
    """So many may begin at the same moment; 0: as many as in a second."""
    cdef Rate rate = Rate(per_span, seconds * SECOND_NS, 1, 0)
    if per_span:
        rate.burst_ns = min(((burst or per_span) - 1) * worth(&rate, 1), LONGEST_BURST_NS) + 1
    return rate


cdef Rate rate_of_bytes(uint64_t per_span, burst, uint64_t seconds):
    """The same of bytes. What of a request is beyond the burst is waited for behind it."""
    cdef Rate rate = Rate(per_span, seconds * SECOND_NS, 1, 0)
    if per_span:
        rate.burst_ns = max(1, min((burst or per_span) * rate.span_ns // per_span, LONGEST_BURST_NS))
    return rate
