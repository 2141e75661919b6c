# Which of two ways is the quicker one, found by trying both: it depends on the machine, the client and the neighbours,
# and nobody tells.
#
# A way is judged by its pace: nanoseconds for each unit of what was to be done, however many come at a time. A round
# has LAPS of them and its quickest counts: what else a machine does makes laps longer, and none shorter. PLAIN takes
# less of the processor, so OTHER has to be quicker by an eighth to be kept. Every so often the way that is not taken
# gets another round, for things change.

from libc.stdint cimport uint64_t

cdef enum:
    PLAIN = 0
    OTHER = 1
    LAPS = 4                  # of a round
    FEWEST_ROUNDS = 4         # that a way is kept before the other is tried again,
    MOST_ROUNDS = 1024        # twice as many each time that the trial was in vain: a trial is what the slowest 1 % feel

cdef struct Trial:
    int way                   # PLAIN or OTHER, now
    int laps                  # of this round that are over
    uint64_t quickest_ns      # of them
    uint64_t pace_ns[2]       # each way's last round; 0: not tried
    int rounds                # since the way that is not taken was tried
    int kept                  # how many rounds until it is again
    int better                # the way that was better, of late
    bint trying               # this round is a trial of the other one

cdef inline void trial_go_plain(Trial* trial) noexcept nogil:
    # Things are otherwise for a while: begin anew when that is over.
    trial.way = PLAIN
    trial.trying = False
    trial.laps = 0

cdef inline void trial_lap(Trial* trial, uint64_t pace_ns, bint ruled_out) noexcept nogil:
    # A lap is over. OTHER is `ruled_out`: it is neither kept nor tried.
    cdef int better
    pace_ns = max(pace_ns, <uint64_t>1)
    trial.quickest_ns = min(trial.quickest_ns, pace_ns) if trial.laps else pace_ns
    trial.laps += 1
    if trial.laps < LAPS and not (ruled_out and trial.way == OTHER):
        return
    trial.pace_ns[trial.way] = trial.quickest_ns
    trial.rounds += 1
    trial.laps = 0
    better = OTHER if 0 < trial.pace_ns[OTHER] < trial.pace_ns[PLAIN] // 8 * 7 and not ruled_out else PLAIN
    if better != trial.better or trial.kept == 0:  # things are otherwise than they were
        trial.better = better
        trial.kept = FEWEST_ROUNDS
        trial.rounds = 0
    elif trial.trying:  # in vain
        trial.kept = min(2 * trial.kept, <int>MOST_ROUNDS)
        trial.rounds = 0
    trial.trying = trial.rounds >= trial.kept and (better == OTHER or not ruled_out)
    trial.way = better if not trial.trying else PLAIN if better == OTHER else OTHER
