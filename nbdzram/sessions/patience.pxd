# Whether a thread looks again and again before it sleeps, while its clients wait for each other's next step.
#
# To be woken costs between 2 and 60 us, by machine: nothing where client and server take turns on one processor, much
# where the other processor must be woken first. A client that sends one request, waits, and sends the next (a machine
# that boots, or swaps) pays it for every one; one that keeps eight under way still waits for a thread that sleeps
# between two batches, and has to wake it itself. So both ways are tried, for a round of waits each, and the one is kept
# in which requests follow each other sooner; every so often the other gets another round.
#
# What looking may cost is bounded: LOOK_NS a wait, of every two processors one (Workers.may_look), nothing for clients
# that are slow, and nothing for a while when the system gave our processor to somebody else meanwhile.

from libc.stdint cimport uint64_t

cdef enum:
    SLEEP = 0
    LOOK = 1
    LOOK_NS = 50000           # longest: a client in the same rack comes back within it
    SLOW_NS = 200000          # waits of more, on average, have not their reason in being woken
    STOLEN_NS = 50000         # between two looks: somebody else ran on our processor
    BARRED_NS = 20000000      # that we then leave it to them
    ROUND_WAITS = 64
    FEWEST_ROUNDS = 16        # that a way is kept before the other is tried again,
    MOST_ROUNDS = 4096        # twice as many each time that the trial was in vain: a trial is what the slowest 1 % feel

cdef struct Patience:
    int way                   # SLEEP or LOOK
    int waits                 # of this round
    uint64_t began            # this round, monotonic ns; 0: it has not
    uint64_t waited_ns        # in this round
    uint64_t served           # requests in this round
    uint64_t pace_ns[2]       # from one request to the next, in each way's last round; 0: not tried
    bint slow                 # the last round's waits were long
    int rounds                # since the other way was tried
    int kept                  # how many rounds until it is again
    int better                # the way that was better, of late
    bint trial                # this round is one
    uint64_t barred_until     # monotonic ns: no looks before

cdef inline void patience_begin(Patience* patience, uint64_t now) noexcept nogil:
    # Begin a round.
    patience.waits = 0
    patience.waited_ns = 0
    patience.served = 0
    patience.began = now

cdef inline void patience_pause(Patience* patience) noexcept nogil:
    # Something else decides when the thread goes on: begin anew when that is over, asleep.
    patience.way = SLEEP
    patience.trial = False
    patience_begin(patience, 0)

cdef inline void patience_learn(
    Patience* patience, bint looked, uint64_t waited_ns, uint64_t served, uint64_t now
) noexcept nogil:
    # A wait that is over now, after a turn of `served` requests. Who was to look and was kept from it learns nothing.
    cdef int better
    if looked != (patience.way == LOOK) or patience.began == 0:
        patience_begin(patience, now)
        return
    patience.waits += 1
    patience.waited_ns += waited_ns
    patience.served += served
    if patience.waits < ROUND_WAITS:
        return
    patience.pace_ns[patience.way] = max((now - patience.began) // max(patience.served, <uint64_t>1), <uint64_t>1)
    patience.slow = patience.waited_ns // ROUND_WAITS > SLOW_NS
    patience.rounds += 1
    patience_begin(patience, now)
    # An eighth: what looking costs the processor is to be worth it.
    better = LOOK if 0 < patience.pace_ns[LOOK] < patience.pace_ns[SLEEP] // 8 * 7 else SLEEP
    if patience.slow:
        better = SLEEP
    if better != patience.better or patience.kept == 0:  # things are otherwise than they were
        patience.better = better
        patience.kept = FEWEST_ROUNDS
        patience.rounds = 0
    elif patience.trial:  # in vain
        patience.kept = min(2 * patience.kept, <int>MOST_ROUNDS)
        patience.rounds = 0
    patience.trial = patience.rounds >= patience.kept and (better == LOOK or not patience.slow)
    patience.way = better if not patience.trial else SLEEP if better == LOOK else LOOK

cdef inline bint patience_looks(Patience* patience, uint64_t now) noexcept nogil:
    # Look this time?
    return patience.way == LOOK and now >= patience.barred_until

cdef inline void patience_bar(Patience* patience, uint64_t now) noexcept nogil:
    # Our processor is wanted by others.
    patience.barred_until = now + BARRED_NS
    patience_pause(patience)
