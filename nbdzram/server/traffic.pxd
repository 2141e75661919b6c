from libc.stdint cimport uint64_t

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    enum:
        CLOCK_MONOTONIC

cdef inline uint64_t monotonic() noexcept nogil:
    # Nanoseconds: what requests are timed by.
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec

cdef enum:
    OPERATIONS = 9   # the commands by number, and one for those that do not exist
    CAUSES = 11      # verdicts
    BUCKETS = 24     # latency: bucket k holds requests under 2**k microseconds, the last one the rest

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

cdef inline int bucket_of(uint64_t nanoseconds) noexcept nogil:
    cdef uint64_t microseconds = nanoseconds // 1000
    cdef int bucket = 64 - __builtin_clzll(microseconds) if microseconds else 0
    return bucket if bucket < BUCKETS else BUCKETS - 1

cdef class Traffic:
    cdef uint64_t requests[OPERATIONS]
    cdef uint64_t size[OPERATIONS]
    cdef uint64_t nanoseconds[OPERATIONS]
    cdef uint64_t errors[OPERATIONS][CAUSES]
    cdef uint64_t latency[OPERATIONS][BUCKETS]
    cdef uint64_t blocks_trimmed
    cdef uint64_t untimed[OPERATIONS]  # counted, but for their latency
    cdef bint untimed_any

    cdef inline void add(self, int command, uint64_t length) noexcept nogil:
        # A request that succeeded. Those of a wake-up leave together: time_added says, once, how long they took.
        self.requests[command] += 1
        self.size[command] += length
        self.untimed[command] += 1
        self.untimed_any = True

    cdef inline void time_added(self, uint64_t nanoseconds) noexcept nogil:
        cdef int command
        self.untimed_any = False
        for command in range(OPERATIONS):
            self.nanoseconds[command] += self.untimed[command] * nanoseconds
            self.latency[command][bucket_of(nanoseconds)] += self.untimed[command]
            self.untimed[command] = 0

    cdef inline void count(self, int command, int verdict, uint64_t length, uint64_t nanoseconds) noexcept nogil:
        if command < 0 or command >= OPERATIONS:
            command = OPERATIONS - 1
        self.requests[command] += 1
        self.nanoseconds[command] += nanoseconds
        self.latency[command][bucket_of(nanoseconds)] += 1
        if verdict == 0:
            self.size[command] += length
        else:
            self.errors[command][verdict] += 1
