# The engine's locks: the pool's and the stripes of its disks (core.pyx has their order).
#
# The pool's has two sides (sides.pxd): taken as a mutex is, it is had alone; writers take it beside each other.
#
# Two kinds of takers. Runs take the pool's lock a million times in a row, and a plain mutex would let them: whoever
# unlocks and locks again wins against a waiter that must first wake up. So they step back while a client waits
# (lock_take_behind).
#
# Every hold is bounded: HOLD entries, cells or zspages, or LOOKS words of nodes of which none leads to a cell, whatever
# a client has written. Tests set `tested`: WATCHED measures each hold, in processor time of its thread (waiting for a
# processor is not the holder's doing), and counts what walks look at in it; PAUSED makes a thread step aside now and
# then before it takes a lock and after it leaves one, so that threads meet where they seldom would; LINGERING keeps a
# thread that left the lock in a certain function, or came to a place with a certain name (lock_step_aside), until the
# test has done what is to happen just then. Off, they cost a comparison of a word on the line that the mutex stands in.

from libc.stdint cimport uint64_t

from nbdzram.engine.sides cimport Seat, Sides
from nbdzram.engine.wait cimport wait_on

cdef enum:
    HOLD = 64     # entries, cells or zspages looked at or changed under one hold of the pool's lock: about 10 us
    HOLD_BYTES = 64 << 10  # of objects copied under one hold: 20 us where no cache has them
    HOLD_FREED = 32  # ... of which each lets go what it leads to: some ten lines of memory that no cache has
    HOLD_PAGES = 8   # that go back to the system under one hold, one by one if it comes to that: some 2 us each
    LOOKS = 4096  # words of nodes passed over under one hold: about 3 us
    WATCHED = 1
    PAUSED = 2
    LINGERING = 4
    LINGER_NAME = 32  # bytes of the function's

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <string.h>
    #include <time.h>

    #define NBDZRAM_WATCHED 1
    #define NBDZRAM_PAUSED 2
    #define NBDZRAM_LINGERING 4

    typedef struct {
        pthread_mutex_t mutex;
        int waiting;
        int tested;
        Sides* sides;            /* NULL: it has one */
        uint64_t turns;          /* taken by others than runs so often */
        uint64_t contended;      /* ... so often somebody had it */
        uint64_t turns_behind;   /* taken behind them so often */
        uint64_t began_ns;       /* of the hold under way; these while WATCHED */
        uint64_t longest_ns;
        const char* longest_in;  /* the function that ended the longest hold */
        uint64_t entries, words;            /* that walks looked at and passed over in it (cursor.pyx) */
        uint64_t most_entries, most_words;  /* ... in any hold */
        char linger_in[32];      /* what the name of the function ends with, while LINGERING */
        int lingering;           /* threads that are there */
    } Lock;

    static __attribute__((unused)) void lock_init(Lock* lock, int tested) {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);  /* held for a microsecond: spin first */
        pthread_mutex_init(&lock->mutex, &attributes);
        pthread_mutexattr_destroy(&attributes);
        lock->waiting = 0;
        lock->tested = tested;
        lock->sides = NULL;
        lock->turns = lock->contended = lock->turns_behind = 0;
        lock->began_ns = lock->longest_ns = 0;
        lock->longest_in = "";
        lock->entries = lock->words = lock->most_entries = lock->most_words = 0;
        lock->linger_in[0] = 0;
        lock->lingering = 0;
    }
    static __attribute__((unused)) void lock_end(Lock* lock) { pthread_mutex_destroy(&lock->mutex); }

    static __attribute__((noinline, cold, unused)) void lock_pause(void) {
        static __thread uint32_t dice = 2463534242u;  /* xorshift32 */
        struct timespec moment = {0, 0};
        dice ^= dice << 13; dice ^= dice >> 17; dice ^= dice << 5;
        if (dice % 8) return;
        moment.tv_nsec = dice % 50000;
        nanosleep(&moment, NULL);
    }
    static __attribute__((noinline, cold, unused)) void lock_linger(Lock* lock, const char* function) {
        size_t length = strlen(function), ending = strlen(lock->linger_in);
        struct timespec moment = {0, 100000};
        if (!ending || length < ending || strcmp(function + length - ending, lock->linger_in)) return;
        __atomic_add_fetch(&lock->lingering, 1, __ATOMIC_RELAXED);
        while (__atomic_load_n(&lock->tested, __ATOMIC_RELAXED) & NBDZRAM_LINGERING) nanosleep(&moment, NULL);
        __atomic_sub_fetch(&lock->lingering, 1, __ATOMIC_RELAXED);
    }
    static __attribute__((noinline, cold, unused)) void lock_step_aside(Lock* lock, const char* where) {
        int tested = lock->tested;
        if (tested & NBDZRAM_PAUSED) lock_pause();
        if (tested & NBDZRAM_LINGERING) lock_linger(lock, where);
    }
    static __attribute__((noinline, cold, unused)) uint64_t lock_clock_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
        return (uint64_t)now.tv_sec * 1000000000u + now.tv_nsec;
    }
    static inline void lock_taken(Lock* lock) {
        if (lock->sides) sides_close(lock->sides);
        if (__builtin_expect(lock->tested & NBDZRAM_WATCHED, 0)) {
            lock->entries = lock->words = 0;
            lock->began_ns = lock_clock_ns();
        }
    }
    static inline void lock_saw(Lock* lock, uint64_t entries, uint64_t words) {  /* the hold under way, of leaves */
        if (__builtin_expect(!(lock->tested & NBDZRAM_WATCHED), 1)) return;
        lock->entries += entries;
        lock->words += words;
        if (lock->entries > lock->most_entries) lock->most_entries = lock->entries;
        if (lock->words > lock->most_words) lock->most_words = lock->words;
    }
    static inline void lock_take(Lock* lock) {
        if (__builtin_expect(lock->tested & NBDZRAM_PAUSED, 0)) lock_pause();
        if (pthread_mutex_trylock(&lock->mutex) != 0) {
            __atomic_add_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
            pthread_mutex_lock(&lock->mutex);
            __atomic_sub_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
            lock->contended++;
        }
        lock->turns++;
        lock_taken(lock);
    }
    static inline void lock_take_behind(Lock* lock) {
        uint32_t looks = 0;
        if (__builtin_expect(lock->tested & NBDZRAM_PAUSED, 0)) lock_pause();
        while (__atomic_load_n(&lock->waiting, __ATOMIC_RELAXED)) wait_on(&looks);
        pthread_mutex_lock(&lock->mutex);
        lock->turns_behind++;
        lock_taken(lock);
    }
    static inline void lock_leave_in(Lock* lock, const char* function) {
        int tested = lock->tested;
        if (__builtin_expect(tested & NBDZRAM_WATCHED, 0) && lock->began_ns) {
            uint64_t held_ns = lock_clock_ns() - lock->began_ns;
            if (held_ns > lock->longest_ns) {
                lock->longest_ns = held_ns;
                lock->longest_in = function;
            }
            lock->began_ns = 0;
        }
        if (lock->sides) sides_open(lock->sides);
        pthread_mutex_unlock(&lock->mutex);
        if (__builtin_expect(tested & NBDZRAM_PAUSED, 0)) lock_pause();
        if (__builtin_expect(tested & NBDZRAM_LINGERING, 0)) lock_linger(lock, function);
    }
    #define lock_leave(lock) lock_leave_in(lock, __func__)

    /* Beside others who write, or look at what is stored. Who finds it had alone waits its turn, and sits down while it
       has the mutex itself: nobody is alone then. */
    static __attribute__((noinline, cold, unused)) void lock_wait_beside(Lock* lock, Seat* seat) {
        __atomic_add_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
        pthread_mutex_lock(&lock->mutex);
        __atomic_sub_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
        lock->contended++;
        __atomic_store_n(&seat->inside, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&lock->mutex);
    }
    static inline void lock_take_beside(Lock* lock, Seat* seat) {
        if (__builtin_expect(lock->tested & NBDZRAM_PAUSED, 0)) lock_pause();
        if (__builtin_expect(!sides_sit(lock->sides, seat), 0)) lock_wait_beside(lock, seat);
        if (__builtin_expect(lock->tested & NBDZRAM_WATCHED, 0)) lock->entries = lock->words = 0;
    }
    static inline void lock_leave_beside_in(Lock* lock, Seat* seat, const char* function) {
        int tested = lock->tested;
        sides_rise(seat);
        if (__builtin_expect(tested & NBDZRAM_PAUSED, 0)) lock_pause();
        if (__builtin_expect(tested & NBDZRAM_LINGERING, 0)) lock_linger(lock, function);
    }
    #define lock_leave_beside(lock, seat) lock_leave_beside_in(lock, seat, __func__)
    """
    ctypedef struct Lock:
        int tested
        Sides* sides
        uint64_t turns
        uint64_t contended
        uint64_t turns_behind
        uint64_t longest_ns
        const char* longest_in
        uint64_t most_entries
        uint64_t most_words
        char* linger_in
        int lingering
    void lock_init(Lock*, int tested)
    void lock_end(Lock*)
    void lock_pause()
    void lock_saw(Lock*, uint64_t entries, uint64_t words)
    void lock_step_aside(Lock*, const char* where)
    void lock_take(Lock*)
    void lock_take_behind(Lock*)
    void lock_leave(Lock*)
    void lock_take_beside(Lock*, Seat*)
    void lock_leave_beside(Lock*, Seat*)
