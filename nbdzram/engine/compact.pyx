"""Compaction: zspages whose objects fit elsewhere are emptied, so that their pages return to the system.

    RESTING -> PLANNING    class by class: mark zspages to empty (Slab.plan_evacuation)
               MOVING      once through the cells: each object in a marked zspage moves to another
               ENDING      class by class: what could not be emptied is used again           -> RESTING

Handles stay. What empties returns by itself, when its last object left. There is one pass at a time in a pool
(Pool.compaction), and whoever has a reason carries it on, a step at a time under the maintenance lock: a run that
somebody asked for (Compact), or a write that found no room (make_room).

A write that found no room compacts before it is refused, on its own thread, with no other lock held. It stops as soon
as it has some pages, so that the cost of a pass is shared by the writes that it makes room for; it begins a pass only
where that gains a page for each WORTH_HANDLES handles to look at, and looks at MOST_HANDLES at most: 4 GiB of blocks,
some milliseconds. So in a full pool no write waits longer, and what stays in gaps when it is refused is at most a page
for 16 MiB of blocks, or more where there are over a million handles and the pass has to go on.

Moving needs room: KEPT_PAGES of the limit are kept for it (ledger.pxd).

Every move holds the pool's lock for about a microsecond, marking and its end for HOLD zspages at a time.

Known limits: a pass reads every cell, 16 bytes a stored block: 1 ms a GiB.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t

from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, kind_of, length_of, slot_of, unit_of
from nbdzram.engine.codec cimport CODEC_FREE
from nbdzram.engine.kit cimport gather_slots
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.core cimport Compaction, PoolCore
from nbdzram.engine.publish cimport look64
from nbdzram.engine.quiescence cimport away, back
from nbdzram.engine.run cimport Run
from nbdzram.engine.slab cimport COMPACTED, can_lie

from nbdzram.engine.reports import CompactReport

cdef enum:
    RESTING = 0
    PLANNING = 1
    MOVING = 2
    ENDING = 3

    ROOM_PAGES = 8           # what a run of blocks (RUN, prepare.pxd) needs that do not compress
    WORTH_HANDLES = 4096     # 16 us to look at
    MOST_HANDLES = 1 << 20
    STEP_HANDLES = 4096      # between two looks at what was gained
    FREES_BEFORE_RETRY = 64  # a pass that came to nothing is tried again once so many objects went


@cython.final
@cython.no_gc_clear
cdef class Compact(Run):
    """See compact.pyi."""

    cdef bint dry_run
    cdef bint begun
    cdef uint64_t number       # of this run's pass
    cdef uint64_t moved_before
    cdef int64_t returned_before
    cdef uint64_t predicted
    cdef uint64_t moved
    cdef int64_t pass_returned

    def __cinit__(self, PoolCore pool, *, dry_run: bool = False):
        self.dry_run = dry_run
        self.cause = COMPACTED
        lock_take(&pool.lock)
        self._total = pool.store.cells.high - 1
        lock_leave(&pool.lock)

    def __dealloc__(self):
        if self.begun:
            with nogil:
                lock_take(&self.pool.maintenance)
                if self._is_under_way() and self.pool.compaction.phase != ENDING:
                    self.pool.compaction.phase = ENDING
                    self.pool.compaction.size_class = 0
                while self._is_under_way():
                    _advance(self.pool, HOLD)
                lock_leave(&self.pool.maintenance)

    def report(self):
        returned = self.predicted if self.dry_run else max(0, self.pass_returned)
        return CompactReport(objects_moved=self.moved, pages_returned=returned)

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        if self.dry_run:
            self.pool.reclaim()
            lock_take_behind(&self.pool.lock)
            self.predicted = _gain(self.pool)
            lock_leave(&self.pool.lock)
            return False
        if not self.begun:
            if self.pool.compaction.phase != RESTING:  # a write's pass: it ends first, so that this one sees everything
                _advance(self.pool, budget)
                return True
            self.pool.reclaim()  # what was freed is room to move to
            self.begun = True
            self.moved_before = self.pool.compaction.moved_ever
            self.returned_before = self.pool.store.slab.returned[COMPACTED]
            _begin(self.pool)
            self.number = self.pool.compaction.number
        if self._is_under_way():
            _advance(self.pool, budget)
        self._done = self.pool.compaction.position - 1 if self._is_under_way() else self._total
        self.moved = self.pool.compaction.moved_ever - self.moved_before
        self.pass_returned = self.pool.store.slab.returned[COMPACTED] - self.returned_before
        return self._is_under_way()

    cdef bint _is_under_way(self) noexcept nogil:
        """Whether this run's pass goes on; writes may have carried it to its end, and begun another."""
        return self.pool.compaction.phase != RESTING and self.pool.compaction.number == self.number


cdef bint make_room(PoolCore pool, bint* waited) noexcept nogil:
    """Return pages for a write that found no room; whether there are any. The caller holds no lock of the engine.

    At first what was freed is waited for, as it is had soon: `waited` says that it was, and nothing was stored since.
    That something was found then proves nothing: it may be the node that the refused write took itself.
    """
    cdef int64_t before
    cdef uint32_t left = MOST_HANDLES
    cdef bint gained
    gained = pool.reclaim() and not waited[0]
    waited[0] = True
    if gained:
        return True
    away()
    lock_take(&pool.maintenance)
    back()
    before = pool.store.slab.returned[COMPACTED]
    lock_take(&pool.lock)
    gained = pool.store.slab.spare_count != 0
    pool.store.slab.return_spares()
    lock_leave(&pool.lock)
    while left and pool.store.slab.returned[COMPACTED] - before < ROOM_PAGES:
        if pool.compaction.phase == RESTING:
            if not _pays(pool):
                break
            _begin(pool)
        _advance(pool, STEP_HANDLES)
        pool.reclaim()
        left -= STEP_HANDLES
    gained = gained or pool.store.slab.returned[COMPACTED] > before
    lock_leave(&pool.maintenance)
    return gained


cdef uint64_t _gain(PoolCore pool) noexcept nogil:
    """Under the lock: pages that a pass would return."""
    cdef uint64_t pages = 0
    cdef int index
    for index in range(pool.store.slab.class_count):
        pages += pool.store.slab.evacuation_gain(index)
    return pages


cdef bint _pays(PoolCore pool) noexcept nogil:
    """Whether a write should begin a pass."""
    cdef bint pays
    cdef uint64_t worth
    lock_take(&pool.lock)
    worth = max(<uint64_t>1, pool.store.cells.high // <uint64_t>WORTH_HANDLES)
    pool.arena.ledger.making_room = True
    pays = (pool.store.slab.freed_ever >= pool.compaction.retry_at) and _gain(pool) >= worth
    pool.arena.ledger.making_room = False
    lock_leave(&pool.lock)
    return pays


cdef void _begin(PoolCore pool) noexcept nogil:
    cdef Compaction* going = &pool.compaction
    lock_take(&pool.lock)
    going.end = pool.store.cells.high
    lock_leave(&pool.lock)
    going.number += 1
    going.phase = PLANNING
    going.size_class = 0
    going.position = 1
    going.marked = 0
    going.returned_before = pool.store.slab.returned[COMPACTED]


cdef void _advance(PoolCore pool, uint32_t budget) noexcept nogil:
    """Carry the pass on by about `budget` zspages and handles."""
    cdef Compaction* going = &pool.compaction
    while budget and going.phase == PLANNING:
        budget -= _plan(pool, min(budget, <uint32_t>HOLD))
    while budget and going.phase == MOVING:
        _visit(pool, going.position)
        going.position += 1
        budget -= 1
        if going.position >= going.end:
            pool.reclaim()  # what was emptied goes, and is not used again
            going.phase = ENDING
    while budget and going.phase == ENDING:
        budget -= _end(pool, min(budget, <uint32_t>HOLD))


cdef uint32_t _plan(PoolCore pool, uint32_t limit) noexcept nogil:
    """Mark up to `limit` zspages of one class, under one hold of the lock; how many were looked at."""
    cdef Compaction* going = &pool.compaction
    cdef uint32_t looked = 1
    lock_take_behind(&pool.lock)
    pool.arena.ledger.making_room = True
    if not pool.store.slab.is_whole(&pool.store.slab.classes[going.size_class]):  # whose pages go back one by one
        gather_slots(&pool.sides, pool.store, going.size_class)  # so that nothing is stored in what is to be emptied
    while looked <= limit and pool.store.slab.plan_evacuation(going.size_class):
        looked += 1
    pool.arena.ledger.making_room = False
    lock_leave(&pool.lock)
    going.marked += looked - 1
    if looked > limit:
        return limit
    going.size_class += 1
    if going.size_class == pool.store.slab.class_count:
        going.size_class = 0
        going.phase = MOVING if going.marked and going.position < going.end else ENDING
    return looked


cdef void _visit(PoolCore pool, uint32_t handle) noexcept nogil:
    """Move the object of this handle if its zspage is being emptied."""
    if not _must_move(pool, look64(&pool.store.cells.cell(handle).word)):  # a hint until the lock is held
        return
    pool.keep_short()
    if not _move(pool, handle) and pool.reclaim():  # what was moved before makes room
        _move(pool, handle)


cdef bint _move(PoolCore pool, uint32_t handle) noexcept nogil:
    """Whether the object of this handle, if it still had to move, was moved."""
    cdef bint moved = True
    lock_take_behind(&pool.lock)
    if _must_move(pool, pool.store.cells.cell(handle).word):
        pool.arena.ledger.making_room = True
        moved = pool.may_retire() and pool.store.move(handle)
        pool.arena.ledger.making_room = False
        pool.compaction.moved_ever += moved
    lock_leave(&pool.lock)
    return moved


cdef bint _must_move(PoolCore pool, uint64_t word) noexcept nogil:
    return (kind_of(word) != CODEC_FREE and kind_of(word) != KIND_FILL and kind_of(word) != KIND_FORWARD
            and can_lie(pool.store.slab, unit_of(word), slot_of(word), length_of(word))
            and pool.store.slab.is_evacuating(unit_of(word)))


cdef uint32_t _end(PoolCore pool, uint32_t limit) noexcept nogil:
    """Use up to `limit` marked zspages of one class again, under one hold of the lock; how many were looked at."""
    cdef Compaction* going = &pool.compaction
    cdef uint32_t looked = 1
    lock_take_behind(&pool.lock)
    while looked <= limit and pool.store.slab.end_evacuation(going.size_class):
        looked += 1
    if looked <= limit:
        going.size_class += 1
    if going.size_class == pool.store.slab.class_count:
        going.phase = RESTING
        if pool.store.slab.returned[COMPACTED] > going.returned_before:
            pool.store.pages_compacted += pool.store.slab.returned[COMPACTED] - going.returned_before
        else:
            going.retry_at = pool.store.slab.freed_ever + FREES_BEFORE_RETRY
    lock_leave(&pool.lock)
    return min(looked, limit)
