"""The one way in which a change becomes true: a store of one aligned word, after everything that it leads to.

A process killed at any instruction has made the store wholly or not at all. Only the compiler must be held to the order:
what a killed process has stored counts, in whatever order its caches were.

That is a claim about every caller, so every caller can be stopped here: kill_at_publish counts down, twice a store, and
tests walk through all moments of a story (tests/faults/test_kill.py). Off, it costs a comparison.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.must cimport must_debug

cdef extern from * nogil:
    """
    #include <signal.h>
    #include <stdint.h>
    #include <unistd.h>
    static long long nbdzram_moments_left = 0;
    static void nbdzram_moment(void) {
        if (__builtin_expect(nbdzram_moments_left != 0, 0) && --nbdzram_moments_left == 0) kill(getpid(), SIGKILL);
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
    void nbdzram_store64(uint64_t* place, uint64_t value)
    void nbdzram_store32(uint32_t* place, uint32_t value)


cdef void publish64(uint64_t* place, uint64_t value) noexcept nogil:
    must_debug(<uint64_t>place % 8 == 0, b"a published word is aligned")
    nbdzram_store64(place, value)


cdef void publish32(uint32_t* place, uint32_t value) noexcept nogil:
    must_debug(<uint64_t>place % 4 == 0, b"a published word is aligned")
    nbdzram_store32(place, value)


def kill_at_publish(long long moment, /) -> None:
    global nbdzram_moments_left
    nbdzram_moments_left = moment


def moments_left() -> int:
    return nbdzram_moments_left
