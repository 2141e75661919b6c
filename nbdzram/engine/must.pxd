# Assertions of compiled code: `must` always, `must_debug` in a build with NBDZRAM_DEBUG=1 (setup.py). A broken one ends
# the process: it holds memory that the disks of others lie in, and its last finished store is a state that opens again.

cdef extern from * nogil:
    """
    #include <stdio.h>
    #include <stdlib.h>
    static __attribute__((noinline, cold, noreturn, unused)) void must_fail(const char* claim) {
        fprintf(stderr, "nbdzram: a bug in the engine, please report it: it does not hold that %s\\n", claim);
        abort();
    }
    #define must(condition, claim) (__builtin_expect(!(condition), 0) ? must_fail(claim) : (void)0)
    #ifdef NBDZRAM_DEBUG
    #define must_debug(condition, claim) must(condition, claim)
    #else
    #define must_debug(condition, claim) ((void)0)
    #endif
    """
    void must(bint condition, const char* claim)
    void must_debug(bint condition, const char* claim)
