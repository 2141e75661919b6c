from libc.stdint cimport uint64_t

from nbdzram.nbd.transmission cimport VERDICTS

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
    BUCKETS = 24     # latency: bucket k holds requests under 2**k microseconds, the last one the rest
    THREADS = 64     # that may write to one tally: I/O threads, and the event loop

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil

cdef inline int bucket_of(uint64_t nanoseconds) noexcept nogil:
    cdef uint64_t microseconds = nanoseconds // 1000
    cdef int bucket = 64 - __builtin_clzll(microseconds) if microseconds else 0
    return bucket if bucket < BUCKETS else BUCKETS - 1

cdef struct Counts:
    # Of one export, by one thread: its only writer. Others read a word at a time, and sum.
    uint64_t requests[OPERATIONS]
    uint64_t size[OPERATIONS]
    uint64_t nanoseconds[OPERATIONS]
    uint64_t errors[OPERATIONS][VERDICTS]
    uint64_t latency[OPERATIONS][BUCKETS]
    uint64_t blocks_trimmed
    uint64_t throttled            # requests that had to wait before they began
    uint64_t throttled_ns
    uint64_t untimed[OPERATIONS]  # counted, but for their latency
    bint untimed_any

cdef inline void count_done(Counts* counts, int command, uint64_t length) noexcept nogil:
    # A request that succeeded. Those of a turn leave together: count_times says, once, how long they took.
    counts.requests[command] += 1
    counts.size[command] += length
    counts.untimed[command] += 1
    counts.untimed_any = True

cdef inline void count_times(Counts* counts, uint64_t nanoseconds) noexcept nogil:
    cdef int command
    counts.untimed_any = False
    for command in range(OPERATIONS):
        if counts.untimed[command]:
            counts.nanoseconds[command] += counts.untimed[command] * nanoseconds
            counts.latency[command][bucket_of(nanoseconds)] += counts.untimed[command]
            counts.untimed[command] = 0

cdef inline void count_timed(
    Counts* counts, int command, int verdict, uint64_t length, uint64_t nanoseconds
) noexcept nogil:
    if command < 0 or command >= OPERATIONS:
        command = OPERATIONS - 1
    counts.requests[command] += 1
    counts.nanoseconds[command] += nanoseconds
    counts.latency[command][bucket_of(nanoseconds)] += 1
    if verdict == 0:
        counts.size[command] += length
    else:
        counts.errors[command][verdict] += 1

cdef class Tally:
    cdef Counts* by_thread[THREADS]
    cdef Counts* of(self, int thread) except NULL
