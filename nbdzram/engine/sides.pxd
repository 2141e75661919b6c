# A lock with two sides: one alone, or many beside each other.
#
#     beside   a thread that writes, or looks at what is stored:
#                                           seat.inside = 1;  look at closed: if set, step back, and wait on the mutex
#     alone    whoever has the mutex:       closed = 1;       wait until no seat is inside;  ...  closed = 0
#
# Each thread has a seat of its own in each lock that it comes to, on lines of its own, so that threads that are beside
# each other write to no line that they share. Both stores and both looks are sequentially consistent: of a thread that
# sits down and one that closes, at least one sees the other.
#
# Who is alone sees everything that was done beside it before, and nothing is done beside it: what only those that are
# alone look at and change needs nothing else. What is changed beside each other has a lock or an owner of its own
# (beside.pyx).
#
# Nobody waits for long. Who is beside waits for nobody but on the small locks below, for some hundred nanoseconds; who
# is alone holds on for no longer than lock.pxd says. Who finds the lock closed queues on the mutex, where runs step
# behind; while it is closed nobody sits down, so a storm of writers keeps nobody out.

from libc.stdint cimport uint32_t

from nbdzram.engine.wait cimport wait_on

cdef extern from * nogil:
    """
    #include <stdint.h>

    #define NBDZRAM_SEATS 128  /* threads that come beside each other; a thread beyond is always alone */

    typedef struct {
        uint32_t inside;  /* its thread is beside others */
        uint32_t user;    /* its thread is in the pool (users.pxd) */
    } Seat;

    typedef struct {
        char apart[128];  /* writers look at what follows, and nobody writes beside it */
        uint32_t closed;
        uint32_t high;    /* seats from here on were never taken */
        Seat* seats[NBDZRAM_SEATS];
        char behind[128];
    } Sides;

    static __attribute__((noinline, cold, unused)) void sides_wait(const uint32_t* word) {
        uint32_t looks = 0;
        while (__atomic_load_n(word, __ATOMIC_SEQ_CST)) wait_on(&looks);
    }
    static inline Seat* sides_seat(const Sides* sides, uint32_t number) {
        return __atomic_load_n(&sides->seats[number], __ATOMIC_SEQ_CST);
    }
    static inline uint32_t sides_high(const Sides* sides) { return __atomic_load_n(&sides->high, __ATOMIC_SEQ_CST); }

    /* By the thread whose number it is, before it sits down. */
    static __attribute__((unused)) void sides_give(Sides* sides, uint32_t number, Seat* seat) {
        uint32_t high = sides_high(sides);
        __atomic_store_n(&sides->seats[number], seat, __ATOMIC_SEQ_CST);
        while (high <= number && !__atomic_compare_exchange_n(
            &sides->high, &high, number + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    }
    static inline void sides_close(Sides* sides) {
        uint32_t number, high;
        Seat* seat;
        __atomic_store_n(&sides->closed, 1, __ATOMIC_SEQ_CST);
        high = sides_high(sides);
        for (number = 0; number < high; number++) {
            seat = sides_seat(sides, number);
            if (seat && __atomic_load_n(&seat->inside, __ATOMIC_SEQ_CST)) sides_wait(&seat->inside);
        }
    }
    static inline void sides_open(Sides* sides) { __atomic_store_n(&sides->closed, 0, __ATOMIC_RELEASE); }

    static inline int sides_sit(Sides* sides, Seat* seat) {
        __atomic_exchange_n(&seat->inside, 1, __ATOMIC_SEQ_CST);
        if (__builtin_expect(!__atomic_load_n(&sides->closed, __ATOMIC_SEQ_CST), 1)) return 1;
        __atomic_store_n(&seat->inside, 0, __ATOMIC_RELEASE);
        return 0;
    }
    static inline void sides_rise(Seat* seat) { __atomic_store_n(&seat->inside, 0, __ATOMIC_RELEASE); }
    """
    enum:
        SEATS "NBDZRAM_SEATS"
    ctypedef struct Seat:
        uint32_t inside
        uint32_t user
    ctypedef struct Sides:
        pass
    Seat* sides_seat(const Sides*, uint32_t number)
    uint32_t sides_high(const Sides*)
    void sides_give(Sides*, uint32_t number, Seat*)
    void sides_wait(const uint32_t*)
