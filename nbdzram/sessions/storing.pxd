# Who stores the large WRITEs of a session: its own thread, or the workers beside it, which spares time only while a
# processor has nothing else to do. A thread of ours that is busy can be counted, a client on the same machine cannot:
# behind TLS it has as much to do as we have, and a hop takes from it what it gives to us. So both ways are tried
# (trial.pxd), and the one is kept in which bytes are stored sooner.

from libc.stdint cimport uint64_t

from nbdzram.sessions.trial cimport DEARER, LIGHTER, Trial, trial_lap

cdef enum:
    BESIDE = DEARER
    LAP_BYTES = 8 << 20       # many times what is under way at once, and some milliseconds
    PAUSE_NS = 5000000        # without a large WRITE: the client's own affair, and in no lap

cdef struct Storing:
    Trial trial               # of the workers, against the thread itself
    uint64_t began            # this lap, monotonic ns
    uint64_t stored           # bytes in this lap
    bint hopped               # the workers stored some of them
    uint64_t last             # when one was stored

cdef inline void storing_begin(Storing* storing) noexcept nogil:
    # Of a session that is new: the first are to be as quick as they can be on a machine that is idle.
    storing.trial.way = BESIDE

cdef inline void storing_begin_lap(Storing* storing, uint64_t now) noexcept nogil:
    storing.began = now
    storing.stored = 0
    storing.hopped = False

cdef inline void storing_expect(Storing* storing, bint busy, uint64_t now) noexcept nogil:
    # The content of a large WRITE begins to come. `busy`: others are under way.
    if not busy and now > storing.last + PAUSE_NS:
        storing_begin_lap(storing, now)

cdef inline bint storing_beside(const Storing* storing, bint idle) noexcept nogil:
    # It has come: is it for the workers? `idle`: they have a processor.
    return idle and storing.trial.way == BESIDE

cdef inline void storing_learn(Storing* storing, bint beside, uint64_t length, uint64_t now) noexcept nogil:
    # It is stored. What was for the workers, and they had no processor, is a part of what they are worth here: else
    # they would never be judged where they are busy now and then. A lap in which they had none at all says nothing of
    # them, nor one of the thread's in which they stored what was begun before.
    storing.last = now
    storing.stored += length
    storing.hopped = storing.hopped or beside
    if storing.stored < LAP_BYTES:
        return
    if storing.hopped == (storing.trial.way == BESIDE):
        trial_lap(&storing.trial, (now - storing.began) * 1024 // storing.stored, 1 << LIGHTER)
    storing_begin_lap(storing, now)
