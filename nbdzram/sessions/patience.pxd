# Whether a thread looks again and again before it sleeps, while its clients wait for each other's next step.
#
# To be woken costs between 2 and 60 us, by machine: nothing where client and server take turns on one processor, much
# where the other processor must be woken first. A client that sends one request, waits, and sends the next (a machine
# that boots, or swaps) pays it for every one; one that keeps eight under way still waits for a thread that sleeps
# between two batches, and has to wake it itself. So both ways are tried (trial.pxd), and the one is kept in which
# requests follow each other sooner.
#
# What looking may cost is bounded: LOOK_NS a wait, of every two processors one (Workers.may_look), nothing for clients
# that are slow, and nothing for a while when the system gave our processor to somebody else meanwhile.

from libc.stdint cimport uint64_t

from nbdzram.sessions.trial cimport OTHER, Trial, trial_go_plain, trial_lap

cdef enum:
    LOOK = OTHER
    LOOK_NS = 50000           # longest: a client in the same rack comes back within it
    SLOW_NS = 200000          # waits of more, on average, have not their reason in being woken
    STOLEN_NS = 50000         # between two looks: somebody else ran on our processor
    BARRED_NS = 20000000      # that we then leave it to them
    LAP_WAITS = 64

cdef struct Patience:
    Trial trial               # of looking, against sleeping at once
    int waits                 # of this lap
    uint64_t began            # this lap, monotonic ns; 0: it has not
    uint64_t waited_ns        # in this lap
    uint64_t served           # requests in this lap
    uint64_t barred_until     # monotonic ns: no looks before

cdef inline void patience_begin_lap(Patience* patience, uint64_t now) noexcept nogil:
    patience.waits = 0
    patience.waited_ns = 0
    patience.served = 0
    patience.began = now

cdef inline void patience_pause(Patience* patience) noexcept nogil:
    # Something else decides when the thread goes on: begin anew when that is over, asleep.
    trial_go_plain(&patience.trial)
    patience_begin_lap(patience, 0)

cdef inline void patience_learn(
    Patience* patience, bint looked, uint64_t waited_ns, uint64_t served, uint64_t now
) noexcept nogil:
    # A wait that is over now, after a turn of `served` requests. Who was to look and was kept from it learns nothing.
    cdef uint64_t pace_ns
    cdef bint slow
    if looked != (patience.trial.way == LOOK) or patience.began == 0:
        patience_begin_lap(patience, now)
        return
    patience.waits += 1
    patience.waited_ns += waited_ns
    patience.served += served
    if patience.waits < LAP_WAITS:
        return
    pace_ns = (now - patience.began) // max(patience.served, <uint64_t>1)
    slow = patience.waited_ns // LAP_WAITS > SLOW_NS
    patience_begin_lap(patience, now)
    trial_lap(&patience.trial, pace_ns, slow)

cdef inline bint patience_looks(Patience* patience, uint64_t now) noexcept nogil:
    # Look this time?
    return patience.trial.way == LOOK and now >= patience.barred_until

cdef inline void patience_bar(Patience* patience, uint64_t now) noexcept nogil:
    # Our processor is wanted by others.
    patience.barred_until = now + BARRED_NS
    patience_pause(patience)
