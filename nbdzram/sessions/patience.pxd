# How a thread waits while its clients send more: asleep until something comes, with a nap before it looks, or looking
# again and again.
#
# To be woken costs between 2 and 60 us, by machine: nothing where client and server take turns on one processor, much
# where the other processor must be woken first. A client that sends one request, waits, and sends the next (a machine
# that boots, or swaps) pays it for every one; one that keeps eight under way still waits for a thread that sleeps
# between two batches, and has to wake it itself. There looking helps. One that keeps thirty-two under way is never
# short of work, and loses time by each waking, and by each answer that comes alone; so does the thread. There a nap
# helps, in which more requests come, and nobody has to wake anybody: what network cards call interrupt moderation. So
# all are tried (trial.pxd), and the one is kept in which requests follow each other sooner.
#
# What looking may cost is bounded: LOOK_NS a wait, of every two processors one (Workers.may_look), nothing for clients
# that are slow, and nothing for a while when the system gave our processor to somebody else meanwhile: some times as
# long as they had it. What a nap may cost is bounded: NAP_NS a wait, and none where requests come further apart than
# some in each, or behind it.

from libc.stdint cimport uint64_t

from nbdzram.sessions.trial cimport (
    DEARER, FEWEST_ROUNDS, LAPS, LIGHTER, PLAIN, Trial, trial_forget, trial_go_plain, trial_in_vain, trial_lap,
)

cdef extern from * nogil:
    """
    #include <sys/prctl.h>
    #include <time.h>
    /* A thread's sleeps end up to 50 us late, unless it asks for better. */
    static inline void patience_be_exact(void) { prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL); }
    static inline void patience_nap(long length) {
        struct timespec nap = {0, length};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);  /* a signal: it is over sooner */
    }
    """
    void patience_be_exact()
    void patience_nap(long length)

cdef enum:
    SLEEP = PLAIN
    NAP = LIGHTER
    LOOK = DEARER
    LOOK_NS = 50000           # longest: a client in the same rack comes back within it
    SLOW_NS = 200000          # waits of more, on average, have not their reason in being woken
    STOLEN_NS = 50000         # between two looks: somebody else ran on our processor
    BARRED_TIMES = 16         # as long as they did we then leave it to them,
    BARRED_NS = 20000000      # at most
    NAP_NS = 15000            # a handful of requests in it, of a client that keeps a processor at work
    LAP_WAITS = 64
    VAIN_WAITS = FEWEST_ROUNDS * LAPS * LAP_WAITS  # in which a way that is kept could not be gone

cdef struct Patience:
    Trial trial               # of the three
    int waits                 # of this lap
    uint64_t began            # this lap, monotonic ns; 0: it has not
    uint64_t waited_ns        # in this lap
    uint64_t served           # requests in this lap
    int vain                  # naps in this lap in which nothing came
    int kept_from             # waits since the last lap in which the way could not be gone
    uint64_t last             # when the last wait was over
    uint64_t barred_until     # monotonic ns: no looks before

cdef inline void patience_begin_lap(Patience* patience, uint64_t now) noexcept nogil:
    patience.waits = 0
    patience.waited_ns = 0
    patience.served = 0
    patience.vain = 0
    patience.began = now

cdef inline void patience_pause(Patience* patience) noexcept nogil:
    # Something else decides when the thread goes on: begin anew when that is over, asleep.
    trial_go_plain(&patience.trial)
    patience_begin_lap(patience, 0)

cdef inline void patience_refused(Patience* patience, uint64_t now) noexcept nogil:
    # A wait was otherwise than it was to be: nothing is learnt of it, and the lap goes on without it. A way that
    # cannot be gone keeps out the others: a trial of it is over, and one that is kept for long is kept no more.
    if patience.began:
        patience.began += now - patience.last
    patience.kept_from += 1
    if patience.trial.trying and patience.kept_from >= LAP_WAITS:
        trial_in_vain(&patience.trial)
    elif patience.kept_from >= VAIN_WAITS:
        trial_forget(&patience.trial)
    else:
        return
    patience.kept_from = 0
    patience_begin_lap(patience, 0)

cdef inline void patience_learn(
    Patience* patience, int way, bint vain, uint64_t waited_ns, uint64_t served, uint64_t now
) noexcept nogil:
    # A wait in this way that is over now, `served` requests after the one before. `vain`: nothing came in its nap.
    cdef uint64_t pace_ns
    cdef int against = 0
    if way != patience.trial.way or way == LOOK and now < patience.barred_until:
        patience_refused(patience, now)
        patience.last = now
        return
    patience.last = now
    if patience.began == 0:
        patience_begin_lap(patience, now)
        return
    patience.waits += 1
    patience.waited_ns += waited_ns
    patience.served += served
    patience.vain += vain
    if patience.waits < LAP_WAITS:
        return
    pace_ns = (now - patience.began) // max(patience.served, <uint64_t>1)
    if patience.waited_ns > LAP_WAITS * <uint64_t>SLOW_NS:
        against |= 1 << LOOK
    if way != LOOK and patience.waited_ns > patience.served * NAP_NS:  # a nap would bring one, if any
        against |= 1 << NAP
    if 2 * patience.vain > LAP_WAITS:
        against |= 1 << NAP
    trial_lap(&patience.trial, pace_ns, against)
    patience.kept_from = 0
    # What comes first in another way is what this one has left.
    patience_begin_lap(patience, now if patience.trial.way == way else 0)

cdef inline int patience_way(Patience* patience, uint64_t now) noexcept nogil:
    # How to wait this time.
    return SLEEP if patience.trial.way == LOOK and now < patience.barred_until else patience.trial.way

cdef inline void patience_bar(Patience* patience, uint64_t taken_ns, uint64_t now) noexcept nogil:
    # Our processor is wanted by others, who had it for so long. A moment, as a machine's housekeeping takes it, says
    # nothing about how clients are served best.
    patience.barred_until = now + min(taken_ns * BARRED_TIMES, <uint64_t>BARRED_NS)
    if patience.barred_until < now + BARRED_NS:
        return
    if patience.trial.trying:
        trial_in_vain(&patience.trial)
    patience_pause(patience)
