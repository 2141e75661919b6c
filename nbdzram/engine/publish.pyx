"""The one way in which a change becomes true: a store of one aligned word, after everything that it leads to.

A process killed at any instruction has made the store wholly or not at all. Only the compiler must be held to the
order: what a killed process has stored counts, in whatever order its caches were.

That is a claim about every caller, so every caller can be stopped here: kill_at_publish counts down, twice a store, and
tests walk through all moments of a story (tests/faults/test_moments.py). pause_at_publish lets the thread step aside
now and then instead, in the middle of a change: who looks without the lock sees half of it. Off, they cost a
comparison.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.must cimport must_debug

cdef extern from * nogil:
    """
    #include <signal.h>
    #include <stdint.h>
    #include <time.h>
    #include <unistd.h>
    #define NBDZRAM_PAUSING (-1)
    static long long nbdzram_moments_left = 0;
    static __attribute__((noinline, cold)) void nbdzram_pause(void) {
        static __thread uint32_t dice = 2463534242u;  /* xorshift32 */
        struct timespec moment = {0, 0};
        dice ^= dice << 13; dice ^= dice >> 17; dice ^= dice << 5;
        moment.tv_nsec = dice % 100000;
        if (dice % 16 == 0) nanosleep(&moment, NULL);
    }
    static inline void nbdzram_moment(void) {
        if (__builtin_expect(nbdzram_moments_left == 0, 1)) return;
        if (nbdzram_moments_left == NBDZRAM_PAUSING) nbdzram_pause();
        else if (--nbdzram_moments_left == 0) kill(getpid(), SIGKILL);
    }
    static inline void nbdzram_step_aside(void) {
        if (__builtin_expect(nbdzram_moments_left == NBDZRAM_PAUSING, 0)) nbdzram_pause();
    }
    static inline void nbdzram_store64(uint64_t* place, uint64_t value) {
        nbdzram_moment();
        __atomic_store_n(place, value, __ATOMIC_RELEASE);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        nbdzram_moment();
    }
    static inline void nbdzram_store32(uint32_t* place, uint32_t value) {
        nbdzram_moment();
        __atomic_store_n(place, value, __ATOMIC_RELEASE);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        nbdzram_moment();
    }
    """
    long long nbdzram_moments_left
    void nbdzram_step_aside()
    void nbdzram_store64(uint64_t* place, uint64_t value)
    void nbdzram_store32(uint32_t* place, uint32_t value)


cdef void publish64(uint64_t* place, uint64_t value) noexcept nogil:
    must_debug(<uint64_t>place % 8 == 0, b"a published word is aligned")
    nbdzram_store64(place, value)


cdef void publish32(uint32_t* place, uint32_t value) noexcept nogil:
    must_debug(<uint64_t>place % 4 == 0, b"a published word is aligned")
    nbdzram_store32(place, value)


cdef void step_aside() noexcept nogil:
    """Between a look and the exchange that hangs on it: where another thread comes in between, under test."""
    nbdzram_step_aside()


def kill_at_publish(long long moment, /) -> None:
    global nbdzram_moments_left
    nbdzram_moments_left = moment


def pause_at_publish(bint on, /) -> None:
    global nbdzram_moments_left
    nbdzram_moments_left = -1 if on else 0


def moments_left() -> int:
    return nbdzram_moments_left
