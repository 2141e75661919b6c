# What is freed and may still be seen by a reader without a lock: slots (slab.pyx), handles (cells.pyx), nodes
# (table.pyx).
#
#     first          ripe            waiting          last
#     |  of nobody   |  wait for the  |  retired since |      numbers of things, in the order in which they were retired
#     |  any more    |  grace period  |  it began      |
#     |              |  `stamp`       |                |
#
# What is ripe is taken back as it is needed, and a thing or two whenever another is retired once there are LIMBO_FEW:
# so what waits stays few, and nothing is taken back in a heap under one hold of the lock. Where the things themselves
# stand is their owner's business. They count as used until they are taken back.
#
# Not locked here: the pool's lock covers every call.

from libc.stdint cimport uint64_t

from nbdzram.engine.publish cimport amend64, look64
from nbdzram.engine.quiescence cimport grace_begin, grace_over

cdef enum:
    LIMBO_FEW = 64           # stay retired until they are needed, or somebody asks what is used
    LIMBO_MANY = 128         # from here on two are taken back for each that is retired
    LIMBO_LOOKS_EVERY = 16   # retired ones: to look at each thread's watch takes a cache line each
    LIMBO_LONG = 1024        # who is about to retire more waits first, outside the locks (reclaim.pyx)
    LIMBO_ROOM = 8192        # things: of a ring; a power of two. What is held at once, HOLD, fits for 112 threads more

cdef struct Limbo:
    uint64_t first, ripe, waiting, last
    uint64_t stamp

cdef inline uint64_t limbo_count(const Limbo* limbo) noexcept nogil:
    return limbo.last - limbo.first

cdef inline uint64_t limbo_hint(const Limbo* limbo) noexcept nogil:
    """limbo_count for who does not hold the lock: what it is now, or was, or far too much."""
    return look64(&limbo.last) - look64(&limbo.first)

cdef inline void limbo_one_more(Limbo* limbo) noexcept nogil:
    amend64(&limbo.last, limbo.last + 1)

cdef inline void limbo_one_less(Limbo* limbo) noexcept nogil:
    amend64(&limbo.first, limbo.first + 1)

cdef inline bint limbo_has_room(const Limbo* limbo, uint64_t count) noexcept nogil:
    """Whether so many more find room in a ring."""
    return limbo_count(limbo) + count <= LIMBO_ROOM

cdef inline bint limbo_ripen(Limbo* limbo) noexcept nogil:
    """Look whether a grace period ended, and begin the next. Whether anything is ripe."""
    if limbo.ripe < limbo.waiting and grace_over(limbo.stamp):
        limbo.ripe = limbo.waiting
    if limbo.ripe == limbo.waiting and limbo.waiting < limbo.last:
        limbo.stamp = grace_begin()
        limbo.waiting = limbo.last
        if grace_over(limbo.stamp):
            limbo.ripe = limbo.waiting
    return limbo.first < limbo.ripe

cdef inline void limbo_ripe_to(Limbo* limbo, uint64_t last) noexcept nogil:
    """A grace period began when so many had been retired, and is over."""
    limbo.ripe = max(limbo.ripe, last)
    limbo.waiting = max(limbo.waiting, last)

cdef inline uint64_t limbo_due(Limbo* limbo) noexcept nogil:
    """How many are to be taken back for one that was retired: of those that are ripe."""
    if limbo_count(limbo) < LIMBO_FEW:
        return 0
    if limbo.first == limbo.ripe and (limbo.last % LIMBO_LOOKS_EVERY or not limbo_ripen(limbo)):
        return 0
    return 1 if limbo_count(limbo) < LIMBO_MANY else 2
