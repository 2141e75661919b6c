# Who is in a pool: every request, change and step of a run, from its first look at the arena to its last.
#
# Readers without a lock are online instead (quiescence.pyx): to be counted would cost all of them the same cache line
# twice a call. Closing waits for a grace period too.
#
# Nor are those counted that write: each has a word of its own, on its seat in the pool (sides.pxd), with the same
# protocol as there: it says that it is in, and looks whether the pool closes; who closes it says so, and looks at each
# seat.
#
# Closing turns newcomers away and waits for those that are in; so whatever comes behind it (the arena's file is another
# process's) comes when nobody is left. Who takes long looks at users_leaving between two holds of the lock, and goes.

from libc.stdint cimport uint32_t

from nbdzram.engine.sides cimport Seat, Sides

cdef extern from * nogil:
    """
    #include <semaphore.h>
    #include <stdint.h>

    #define NBDZRAM_CLOSING 1u
    #define NBDZRAM_USER 2u

    typedef struct {
        uint32_t state;  /* CLOSING, and USER for each that is in */
        sem_t left;      /* posted by the last one out of a closing pool */
    } Users;

    static __attribute__((unused)) void users_init(Users* users) {
        users->state = 0;
        sem_init(&users->left, 0, 0);
    }
    static __attribute__((unused)) void users_end(Users* users) { sem_destroy(&users->left); }

    static inline void users_leave(Users* users) {
        if (__atomic_sub_fetch(&users->state, NBDZRAM_USER, __ATOMIC_ACQ_REL) == NBDZRAM_CLOSING)
            sem_post(&users->left);
    }
    static inline int users_enter(Users* users) {
        if (!(__atomic_add_fetch(&users->state, NBDZRAM_USER, __ATOMIC_ACQ_REL) & NBDZRAM_CLOSING)) return 1;
        users_leave(users);
        return 0;
    }
    static inline int users_leaving(Users* users) {
        return __atomic_load_n(&users->state, __ATOMIC_SEQ_CST) & NBDZRAM_CLOSING;
    }
    static inline void users_rise(Users* users, Seat* seat) {
        if (seat) __atomic_store_n(&seat->user, 0, __ATOMIC_RELEASE);
        else users_leave(users);
    }
    static inline int users_sit(Users* users, Seat* seat) {  /* NULL: it has none, and is counted */
        if (!seat) return users_enter(users);
        __atomic_exchange_n(&seat->user, 1, __ATOMIC_SEQ_CST);
        if (!users_leaving(users)) return 1;
        users_rise(users, seat);
        return 0;
    }
    static __attribute__((unused)) void users_close(Users* users, Sides* sides) {
        uint32_t number;
        Seat* seat;
        __atomic_or_fetch(&users->state, NBDZRAM_CLOSING, __ATOMIC_SEQ_CST);
        for (number = 0; number < sides_high(sides); number++) {
            seat = sides_seat(sides, number);
            if (seat) sides_wait(&seat->user);
        }
        while (__atomic_load_n(&users->state, __ATOMIC_ACQUIRE) != NBDZRAM_CLOSING) sem_wait(&users->left);
        sem_post(&users->left);  /* for another who closes */
    }
    """
    ctypedef struct Users:
        uint32_t state
    void users_init(Users*)
    void users_end(Users*)
    bint users_enter(Users*)
    void users_leave(Users*)
    bint users_leaving(Users*)
    bint users_sit(Users*, Seat*)
    void users_rise(Users*, Seat*)
    void users_close(Users*, Sides*)
