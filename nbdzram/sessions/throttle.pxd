from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport READ, TRIM, WRITE, WRITE_ZEROES, Request
from nbdzram.sessions.turns cimport pthread_mutex_t

cdef extern from * nogil:
    """
    #include <poll.h>
    #include <stdint.h>
    #include <time.h>
    static inline int throttle_look(const int* place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    static inline void throttle_set(int* place, int to) { __atomic_store_n(place, to, __ATOMIC_RELEASE); }
    /* epoll_wait counts in milliseconds: too coarse for hundreds of requests a second. */
    static inline void poll_until(int poller, uint64_t due, uint64_t now) {
        struct pollfd asked = {poller, POLLIN, 0};
        uint64_t left = due > now ? due - now : 0;
        struct timespec most = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
        if (ppoll(&asked, 1, &most, NULL) < 0) return;  /* a signal: its thread looks again */
    }
    """
    int throttle_look(const int* place)
    void throttle_set(int* place, int to)
    void poll_until(int poller, uint64_t due, uint64_t now)

cdef struct Rate:
    uint64_t per_span      # requests, or bytes; 0: no limit
    uint64_t span_ns       # a second
    uint64_t burst_ns      # how far ahead of now what was granted may reach
    uint64_t until         # monotonic ns: when what was granted is worth its time

cdef struct Place:
    # Of one request. Its session's alone.
    uint64_t epoch         # of the limits under which it was taken; 0: none is taken
    uint64_t taken         # monotonic ns
    uint64_t due           # when the request may begin
    bint scarce            # half of the burst is used up
    uint64_t size          # bytes that it moves

cdef class Throttle:
    cdef pthread_mutex_t mutex
    cdef int limited       # is any limit set?
    cdef uint64_t epoch    # how often they were set; from here on all under the mutex
    cdef Rate requests
    cdef Rate traffic
    cdef void take(self, Place* place, uint64_t size, uint64_t now) noexcept nogil
    cdef void give_back(self, Place* place) noexcept nogil

    cdef inline bint is_limited(self) noexcept nogil:
        return throttle_look(&self.limited)

cdef Rate rate_of_requests(uint64_t per_span, burst, uint64_t seconds)
cdef Rate rate_of_bytes(uint64_t per_span, burst, uint64_t seconds)

cdef inline bint is_measured(const Request* request) noexcept nogil:
    # What reads or changes content. All else, a FLUSH too, is answered from what is there.
    return (request.command == READ or request.command == WRITE or request.command == TRIM
            or request.command == WRITE_ZEROES)

cdef inline uint64_t bytes_moved(const Request* request) noexcept nogil:
    # TRIM and WRITE_ZEROES are requests that move none.
    return request.length if request.command == READ or request.command == WRITE else 0

cdef inline uint64_t worth(const Rate* rate, uint64_t amount) noexcept nogil:
    # In nanoseconds, rounded up: what is granted is never more than the limit. No request is so large that this
    # overflows.
    return (amount * rate.span_ns + rate.per_span - 1) // rate.per_span

cdef inline uint64_t rate_due(const Rate* rate) noexcept nogil:
    # From when on the next one may begin: when what was granted is less than a burst ahead.
    return rate.until - rate.burst_ns + 1 if rate.per_span and rate.until >= rate.burst_ns else 0

cdef inline bint rate_is_scarce(const Rate* rate, uint64_t now) noexcept nogil:
    # Not by rate_due, which cannot lie before the clock's own beginning: a machine that has just booted.
    return rate.per_span != 0 and rate.until >= now + (rate.burst_ns + 1) // 2

cdef inline void rate_grant(Rate* rate, uint64_t amount, uint64_t due) noexcept nogil:
    # `amount` begins at `due`: rate_due, or later.
    if rate.per_span:
        rate.until = max(rate.until, due) + worth(rate, amount)

cdef inline void rate_take_back(Rate* rate, uint64_t amount) noexcept nogil:
    if rate.per_span:
        rate.until -= min(rate.until, worth(rate, amount))
