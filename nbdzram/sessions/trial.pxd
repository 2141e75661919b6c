# Which of several ways is the quickest, found by trying them: it depends on the machine, the client and the
# neighbours, and nobody tells.
#
# A way is judged by its pace: nanoseconds for each unit of what was to be done, however many come at a time. A round
# has LAPS of them and its quickest counts: what else a machine does makes laps longer, and none shorter. LIGHTER takes
# less of the processor than PLAIN, so it is taken if it is no slower, and kept until it is by a sixteenth; DEARER takes
# more, so it has to be quicker than the other two by an eighth. Every so often the ways that are not taken get another
# round each, for things change.

from libc.stdint cimport uint64_t
from libc.string cimport memset

cdef enum:
    PLAIN = 0
    LIGHTER = 1
    DEARER = 2
    WAYS = 3
    LAPS = 4                  # of a round
    FEWEST_ROUNDS = 4         # that a way is kept before the others are tried again,
    MOST_ROUNDS = 1024        # twice as many each time that the trial was in vain: a trial is what the slowest 1 % feel

cdef struct Trial:
    int way                   # now
    int laps                  # of this round that are over
    uint64_t quickest_ns      # of them
    int against[WAYS]         # how many of them were against a way
    uint64_t pace_ns[WAYS]    # each way's last round; 0: not tried, or ruled out then
    int rounds                # since the ways that are not taken were tried
    int kept                  # how many rounds until they are again
    int better                # the way that was better, of late
    bint trying               # this round is a trial of another one

cdef inline bint trial_may(int way, int ruled_out) noexcept nogil:
    # `ruled_out`: a bit for each way that is neither kept nor tried.
    return not ruled_out >> way & 1

cdef inline int trial_better(Trial* trial, int ruled_out) noexcept nogil:
    # The way to keep, by what is known.
    cdef int better = PLAIN
    cdef uint64_t least_ns = trial.pace_ns[PLAIN]
    cdef uint64_t grace_ns = least_ns // 16 if trial.better == LIGHTER else 0
    if trial_may(LIGHTER, ruled_out) and 0 < trial.pace_ns[LIGHTER] <= least_ns + grace_ns:
        better = LIGHTER
        least_ns = min(least_ns, trial.pace_ns[LIGHTER])
    if trial_may(DEARER, ruled_out) and 0 < trial.pace_ns[DEARER] < least_ns // 8 * 7:
        better = DEARER
    return better

cdef inline int trial_next(Trial* trial, int after, int ruled_out) noexcept nogil:
    # The first way behind `after` that a trial has to try; WAYS: none.
    cdef int way
    for way in range(after + 1, WAYS):
        if way != trial.better and trial_may(way, ruled_out):
            return way
    return WAYS

cdef inline void trial_begin_round(Trial* trial, int way) noexcept nogil:
    trial.way = way
    trial.laps = 0
    memset(trial.against, 0, sizeof(trial.against))

cdef inline void trial_go_plain(Trial* trial) noexcept nogil:
    # Things are otherwise for a while: begin anew when that is over, and with a trial when that is due once more.
    if trial.trying:
        trial.rounds = 0
    trial.trying = False
    trial_begin_round(trial, PLAIN)

cdef inline void trial_in_vain(Trial* trial) noexcept nogil:
    # A trial is over, by itself or as its way cannot be gone now: the next one comes later.
    trial.kept = min(2 * trial.kept, <int>MOST_ROUNDS)
    trial.rounds = 0
    trial.trying = False
    trial_begin_round(trial, trial.better)

cdef inline void trial_forget(Trial* trial) noexcept nogil:
    # The way that is kept cannot be gone now: what it was worth is no measure of the others.
    trial.pace_ns[trial.better] = 0
    trial.better = PLAIN
    trial.kept = 0
    trial_go_plain(trial)

cdef inline void trial_lap(Trial* trial, uint64_t pace_ns, int against) noexcept nogil:
    # A lap is over, and against some ways, never PLAIN. A round rules those out that two of its laps are against: one
    # lap alone may have been made long by something else.
    cdef int way, better, next, ruled_out = 0
    pace_ns = max(pace_ns, <uint64_t>1)
    trial.quickest_ns = min(trial.quickest_ns, pace_ns) if trial.laps else pace_ns
    trial.laps += 1
    for way in range(WAYS):
        trial.against[way] += against >> way & 1
        ruled_out |= (trial.against[way] > 1) << way
    if trial.laps < LAPS and trial_may(trial.way, ruled_out):
        return
    trial.pace_ns[trial.way] = trial.quickest_ns if trial_may(trial.way, ruled_out) else 0
    better = trial_better(trial, ruled_out)
    next = WAYS
    if better != trial.better or trial.kept == 0:  # things are otherwise than they were
        trial.better = better
        trial.kept = FEWEST_ROUNDS
        trial.rounds = 0
    elif trial.trying:
        next = trial_next(trial, trial.way, ruled_out)
        if next == WAYS:
            trial_in_vain(trial)
            return
    else:
        trial.rounds = min(trial.rounds + 1, trial.kept)
        if trial.rounds == trial.kept:
            next = trial_next(trial, -1, ruled_out)
    trial.trying = next != WAYS
    trial_begin_round(trial, next if trial.trying else better)
