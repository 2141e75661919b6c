from libc.stdint cimport uint64_t

from nbdzram.sessions.mail cimport Bell

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef enum:  # what a payload under way is
    NO_TURN = 0
    BUFFERED = 1   # it has a buffer
    WAITING = 2    # it has none, and must wait
    ADMITTED = 3   # it has none, and is stored as it arrives

cdef struct Turn:
    # A session's; all but `remaining`, `state` and `too_slow` belong to Turns, under its mutex.
    Turn* next
    Turn* before
    Bell* bell               # of the session: rung when its turn has come, or it must go
    int state
    uint64_t size            # bytes of the payload
    uint64_t arrival
    uint64_t remaining       # bytes still to come: the session writes, `watch` reads
    uint64_t watched         # bytes that were still to come when the pace began to count
    bint is_watched
    int too_slow             # it was told to go, in the middle of the payload that is still under way
    uint64_t sent            # what had come then

cdef class Turns:
    cdef pthread_mutex_t mutex
    cdef Turn* first
    cdef uint64_t arrivals
    cdef int seconds
    cdef void hold(self, Turn* turn, uint64_t size) noexcept nogil
    cdef void enter(self, Turn* turn, uint64_t size) noexcept nogil
    cdef void leave(self, Turn* turn) noexcept nogil
    cdef void _link(self, Turn* turn, int state, uint64_t size) noexcept nogil
    cdef void _admit(self, Turn* newcomer) noexcept nogil
    cdef int _waiting(self) noexcept nogil

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int turn_state(const int* state) { return __atomic_load_n(state, __ATOMIC_ACQUIRE); }
    static inline void turn_set(int* state, int to) { __atomic_store_n(state, to, __ATOMIC_RELEASE); }
    static inline void turn_left(uint64_t* remaining, uint64_t to) {
        __atomic_store_n(remaining, to, __ATOMIC_RELAXED);
    }
    static inline uint64_t turn_rest(uint64_t* remaining) { return __atomic_load_n(remaining, __ATOMIC_RELAXED); }
    """
    int turn_state(const int*)
    void turn_set(int*, int)
    void turn_left(uint64_t*, uint64_t)
    uint64_t turn_rest(uint64_t*)

cdef inline bint may_go_on(const Turn* turn) noexcept nogil:
    # It is admitted, or needs no turn.
    return turn_state(&turn.state) != WAITING

cdef inline bint is_too_slow(const Turn* turn) noexcept nogil:
    # It was told to go, and its payload is not complete since.
    return turn_state(&turn.too_slow)
