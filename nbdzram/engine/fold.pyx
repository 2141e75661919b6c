"""Folding and compaction: two runs over a pool in bounded steps, off the clients' way.

Fold. The index (index.pyx) knows the suspects: objects whose fingerprint was present when they came. A run goes through
the pending bitmap from handle 1 to the highest; each suspect is compared with the linked objects of its fingerprint,
byte for byte, and merged into the one that is equal, or linked itself when none is. Of two encodings of one block the
shorter stays. A run needs no memory of its own, and costs in proportion to the suspects; those that come behind its
position wait for the next.

    suspect, linked object of the same fingerprint
      same codec, same bytes   -> equal
      both raw, other bytes    -> different
      anything else            -> decode both and compare the blocks

Compaction. Slab.plan_evacuation marks the zspages whose objects fit elsewhere, class by class; one pass over the cells
moves each object out of them; what empties returns to the system by itself, and what did not is used again. Handles
stay.

Every comparison and move holds the pool's lock for about a microsecond, marking and its end for HOLD zspages at a time;
decoding happens outside it, on copies of objects that are held (acquire) meanwhile. A step looks at up to `budget`
handles or zspages.

Known limits: compaction reads every cell, 16 bytes a stored block: 1 ms a GiB.
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, kind_of, length_of, unit_of
from nbdzram.engine.codec cimport BLOCK, CODEC_FREE, CODEC_RAW
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.pool cimport Pool
from nbdzram.engine.run cimport Run


@cython.final
cdef class Fold(Run):
    """See fold.pyi."""

    cdef bint dry_run
    cdef uint32_t position
    cdef uint32_t end
    cdef uint64_t merged
    cdef uint64_t freed
    cdef uint64_t pages
    cdef uint64_t compared

    def __cinit__(self, Pool pool, *, dry_run: bool = False):
        self.dry_run = dry_run
        self.position = 1
        lock_take(&pool.lock)
        self.end = pool.store.cells.high
        self._total = pool.store.index.pending_count
        lock_leave(&pool.lock)

    def report(self):
        return {
            "objects_merged": self.merged,
            "bytes_freed": self.freed,
            "pages_returned": self.pages,
            "comparisons": self.compared,
        }

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        cdef uint32_t suspect
        cdef bint found
        while budget and self.position < self.end:
            budget -= 1
            lock_take_behind(&self.pool.lock)
            found = self.pool.store.index.next_pending(&self.position)
            if found and self.position < self.end:
                suspect = self.position
                self.position += 1
                self._done += 1
                self._settle(suspect)
            lock_leave(&self.pool.lock)
        return self.position < self.end

    cdef void _settle(self, uint32_t suspect) noexcept nogil:
        """Merge or link one suspect. Holds the lock, and lets it go to decode.

        While it is gone both objects are held, so neither is freed, and no other run can merge them; but clients may
        free what stands beside them, and buckets may turn.
        """
        cdef uint64_t fingerprint = self.pool.store.cells.cell(suspect).fingerprint
        cdef uint32_t other = self.pool.store.index.first(fingerprint)
        cdef uint32_t following
        cdef uint64_t turns
        cdef bint equal, suspect_lives, other_lives
        while other:
            self.compared += 1
            if self._same_bytes(suspect, other):
                self._merge(suspect, other)
                return
            if (kind_of(self.pool.store.cells.cell(suspect).word) == CODEC_RAW
                    and kind_of(self.pool.store.cells.cell(other).word) == CODEC_RAW):
                other = self.pool.store.index.find(fingerprint, other)
                continue
            turns = self.pool.store.index.turns
            self.pool.store.acquire(suspect)
            self.pool.store.acquire(other)
            equal = self._same_block(suspect, other)
            following = self.pool.store.index.find(fingerprint, other)
            suspect_lives = self.pool.store.cells.refs(suspect) > 1
            other_lives = self.pool.store.cells.refs(other) > 1
            self.pool.store.release(suspect)
            self.pool.store.release(other)
            if not suspect_lives:
                return
            if equal and other_lives:
                self._merge(suspect, other)
                return
            # A chain that turned may have its order reversed: begin again rather than pass over an equal object.
            if turns != self.pool.store.index.turns:
                following = self.pool.store.index.first(fingerprint)
            other = following
        self.pool.store.index.clear_pending(suspect)
        self.pool.store.index.link(suspect)

    cdef bint _same_bytes(self, uint32_t one, uint32_t other) noexcept nogil:
        cdef uint64_t one_word = self.pool.store.cells.cell(one).word
        cdef uint64_t other_word = self.pool.store.cells.cell(other).word
        if kind_of(one_word) != kind_of(other_word) or length_of(one_word) != length_of(other_word):
            return False
        return memcmp(
            self.pool.store.bytes_at(one_word), self.pool.store.bytes_at(other_word), length_of(one_word)
        ) == 0

    cdef bint _same_block(self, uint32_t one, uint32_t other) noexcept nogil:
        """Decode both, which are held, without the lock."""
        cdef uint8_t one_encoded[BLOCK]
        cdef uint8_t other_encoded[BLOCK]
        cdef uint8_t one_block[BLOCK]
        cdef uint8_t other_block[BLOCK]
        cdef uint64_t one_word = self.pool.store.cells.cell(one).word
        cdef uint64_t other_word = self.pool.store.cells.cell(other).word
        cdef bint equal
        memcpy(one_encoded, self.pool.store.bytes_at(one_word), length_of(one_word))
        memcpy(other_encoded, self.pool.store.bytes_at(other_word), length_of(other_word))
        lock_leave(&self.pool.lock)
        equal = (
            self.pool.store.decode(kind_of(one_word), one_encoded, length_of(one_word), one_block)
            and self.pool.store.decode(kind_of(other_word), other_encoded, length_of(other_word), other_block)
            and memcmp(one_block, other_block, BLOCK) == 0
        )
        lock_take_behind(&self.pool.lock)
        return equal

    cdef void _merge(self, uint32_t suspect, uint32_t other) noexcept nogil:
        """Two equal objects become one: the shorter stays, of equals the one that is linked."""
        cdef uint32_t suspect_length = length_of(self.pool.store.cells.cell(suspect).word)
        cdef uint32_t other_length = length_of(self.pool.store.cells.cell(other).word)
        cdef uint32_t loser = suspect
        cdef uint64_t pages = self.pool.store.pages_folded
        if suspect_length < other_length:
            loser = other
            self.pool.store.index.clear_pending(suspect)
            self.pool.store.index.remove(other)
            self.pool.store.index.link(suspect)
            self.pool.store.index.set_pending(other)
        if self.dry_run:
            # Which of the two is linked stays, so that the next is compared with what a fold would have kept; a loser
            # that this run has still to come to is counted then.
            if loser == suspect or loser < self.position or loser >= self.end:
                self._count(loser)
            return
        self._count(loser)
        self.pool.store.index.clear_pending(loser)
        self.pool.store.merge(loser, suspect if loser == other else other)
        self.pages += self.pool.store.pages_folded - pages

    cdef void _count(self, uint32_t loser) noexcept nogil:
        self.merged += 1
        self.freed += length_of(self.pool.store.cells.cell(loser).word)


@cython.final
cdef class Compact(Run):
    """See fold.pyi."""

    cdef bint dry_run
    cdef int planned           # size classes whose zspages are chosen
    cdef uint64_t marked       # zspages to empty
    cdef uint32_t position
    cdef uint32_t end
    cdef int ended             # size classes in which what was marked is used again
    cdef uint64_t predicted
    cdef uint64_t moved
    cdef int64_t pages

    def __cinit__(self, Pool pool, *, dry_run: bool = False):
        self.dry_run = dry_run
        self.position = 1
        lock_take(&pool.lock)
        self.end = pool.store.cells.high
        lock_leave(&pool.lock)
        self._total = self.end - 1

    def __dealloc__(self):
        if self.planned:
            while self.ended < self.pool.store.slab.class_count:
                self._end(HOLD)

    def report(self):
        return {"objects_moved": self.moved, "pages_returned": self.predicted if self.dry_run else max(0, self.pages)}

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        cdef int classes = self.pool.store.slab.class_count
        cdef uint32_t handle
        if self.dry_run:
            self._predict()
            return False
        while budget and self.planned < classes:
            budget -= self._plan(min(budget, <uint32_t>HOLD))
        if self.planned < classes:
            return True
        if self.marked == 0:
            self.position = self.end
        handle = self.position
        self.position = <uint32_t>min(<uint64_t>handle + budget, self.end)
        budget -= self.position - handle
        for handle in range(handle, self.position):
            self._visit(handle)
        self._done = self.position - 1
        while budget and self.ended < classes:
            budget -= self._end(min(budget, <uint32_t>HOLD))
        return self.ended < classes

    cdef void _predict(self) noexcept nogil:
        cdef int index
        self.predicted = 0
        lock_take_behind(&self.pool.lock)
        for index in range(self.pool.store.slab.class_count):
            self.predicted += self.pool.store.slab.evacuation_gain(index)
        lock_leave(&self.pool.lock)

    cdef uint32_t _plan(self, uint32_t limit) noexcept nogil:
        """Mark up to `limit` zspages of one class, under one hold of the lock; how many were looked at."""
        cdef uint32_t looked = 1
        lock_take_behind(&self.pool.lock)
        while looked <= limit and self.pool.store.slab.plan_evacuation(self.planned):
            looked += 1
        lock_leave(&self.pool.lock)
        self.marked += looked - 1
        if looked > limit:
            return limit
        self.planned += 1
        return looked

    cdef void _visit(self, uint32_t handle) noexcept nogil:
        """Move the object of this handle if its zspage is being emptied."""
        cdef uint64_t word = self.pool.store.cells.cell(handle).word  # a hint until the lock is held
        cdef uint64_t pages
        if not self._must_move(word):
            return
        lock_take_behind(&self.pool.lock)
        word = self.pool.store.cells.cell(handle).word
        if self._must_move(word):
            pages = self.pool.store.slab.pages_used
            if self.pool.store.move(handle):
                self.moved += 1
            self.pages += <int64_t>(pages - self.pool.store.slab.pages_used)
        lock_leave(&self.pool.lock)

    cdef bint _must_move(self, uint64_t word) noexcept nogil:
        return (kind_of(word) != CODEC_FREE and kind_of(word) != KIND_FILL and kind_of(word) != KIND_FORWARD
                and self.pool.store.slab.is_evacuating(unit_of(word)))

    cdef uint32_t _end(self, uint32_t limit) noexcept nogil:
        """Use up to `limit` marked zspages of one class again, under one hold of the lock; how many were looked at."""
        cdef uint32_t looked = 1
        lock_take_behind(&self.pool.lock)
        while looked <= limit and self.pool.store.slab.end_evacuation(self.ended):
            looked += 1
        if looked <= limit:
            self.ended += 1
            if self.ended == self.pool.store.slab.class_count and self.pages > 0:
                self.pool.store.pages_compacted += self.pages
        lock_leave(&self.pool.lock)
        return min(looked, limit)
