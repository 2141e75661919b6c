# Which of several ways is the quickest, found by trying them: it depends on the machine, the client and the
# neighbours, and nobody tells.
#
# A way is judged by its pace: nanoseconds for each unit of what was to be done, however many come at a time. A round
# has LAPS of them and its quickest counts: what else a machine does makes laps longer, and none shorter. LIGHTER takes
# less of the processor than PLAIN, so it is taken if it is no slower, and kept until it is by a sixteenth; DEARER takes
# more, so it has to be quicker than the other two by an eighth. Every so often the ways that are not taken get another
# round each, for things change.

from libc.stdint cimport uint64_t

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
    int ruled_out             # the ways that each of them was against
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
    cdef uint64_t enough_ns = trial.pace_ns[PLAIN] // 16 * (17 if trial.better == LIGHTER else 16)
    if trial_may(LIGHTER, ruled_out) and 0 < trial.pace_ns[LIGHTER] <= enough_ns:
        better = LIGHTER
    if trial_may(DEARER, ruled_out) and 0 < trial.pace_ns[DEARER] < trial.pace_ns[better] // 8 * 7:
        better = DEARER
    return better

cdef inline int trial_next(Trial* trial, int after, int ruled_out) noexcept nogil:
    # The first way behind `after` that a trial has to try; WAYS: none.
    cdef int way
    for way in range(after + 1, WAYS):
        if way != trial.better and trial_may(way, ruled_out):
            return way
    return WAYS

cdef inline void trial_go_plain(Trial* trial) noexcept nogil:
    # Things are otherwise for a while: begin anew when that is over.
    trial.way = PLAIN
    trial.trying = False
    trial.laps = 0

cdef inline void trial_lap(Trial* trial, uint64_t pace_ns, int ruled_out) noexcept nogil:
    # A lap is over, and against some ways, never PLAIN.
    cdef int better, next
    pace_ns = max(pace_ns, <uint64_t>1)
    trial.quickest_ns = min(trial.quickest_ns, pace_ns) if trial.laps else pace_ns
    ruled_out &= trial.ruled_out if trial.laps else ~0
    trial.ruled_out = ruled_out
    trial.laps += 1
    if trial.laps < LAPS:
        return
    trial.pace_ns[trial.way] = trial.quickest_ns if trial_may(trial.way, ruled_out) else 0
    trial.laps = 0
    better = trial_better(trial, ruled_out)
    next = WAYS
    if better != trial.better or trial.kept == 0:  # things are otherwise than they were
        trial.better = better
        trial.kept = FEWEST_ROUNDS
        trial.rounds = 0
    elif trial.trying:
        next = trial_next(trial, trial.way, ruled_out)
        if next == WAYS:  # in vain
            trial.kept = min(2 * trial.kept, <int>MOST_ROUNDS)
            trial.rounds = 0
    else:
        trial.rounds += 1
        if trial.rounds >= trial.kept:
            next = trial_next(trial, -1, ruled_out)
    trial.trying = next != WAYS
    trial.way = next if trial.trying else better
