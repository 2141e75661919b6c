# Small locks, many of them, each held for some tens of nanoseconds and hardly ever wanted by two: of the index's
# buckets.
#
# All zeroes is a latch that nobody holds, so that those of a small pool are not even resident. Each has a line of its
# own.

cdef enum:
    LATCHES = 1024  # of an index: with sixteen writers one in two thousand takes finds its latch held; 64 KiB

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <stdint.h>

    typedef union {
        pthread_mutex_t mutex;  /* PTHREAD_MUTEX_INITIALIZER is all zeroes */
        char line[64];
    } Latch;
    _Static_assert(sizeof(Latch) == 64, "a latch is a line of the cache");

    static inline void latch_take(Latch* latch) { pthread_mutex_lock(&latch->mutex); }
    static inline void latch_leave(Latch* latch) { pthread_mutex_unlock(&latch->mutex); }
    """
    ctypedef struct Latch:
        char* line
    void latch_take(Latch*)
    void latch_leave(Latch*)
