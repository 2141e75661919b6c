# Waiting for what another thread is through with in some microseconds, if it has a processor: look again for so long,
# then sleep, and look again.
#
# Never sched_yield. Where threads outnumber processors, a thread that yields gives up what is left of its share: since
# Linux 6.18 some 4 ms each time beside one other thread that is busy, so that 64 yields took 160 to 400 ms (measured),
# and clients waited as long. One that sleeps keeps its share, and is let in front as it wakes.

cdef extern from * nogil:
    """
    #ifndef NBDZRAM_WAIT
    #define NBDZRAM_WAIT
    #include <stdint.h>
    #include <time.h>

    #define NBDZRAM_LOOKS 2000     /* some microseconds: a run of blocks is stored, a turn ends in fewer */
    #define NBDZRAM_WAIT_NS 20000  /* and what the kernel adds to each sleep, 50 us */

    static inline void wait_on(uint32_t* looks) {
        const struct timespec moment = {0, NBDZRAM_WAIT_NS};
        if (++*looks < NBDZRAM_LOOKS) __atomic_signal_fence(__ATOMIC_SEQ_CST);
        else nanosleep(&moment, NULL);
    }
    #endif
    """
    void wait_on(unsigned int* looks)
