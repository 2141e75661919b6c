"""Folding: a run over a pool in bounded steps, off the clients' way.

The index (index.pyx) knows the suspects: objects whose fingerprint was present when they came. A run goes through
the pending bitmap from handle 1 to the highest; each suspect is compared with the linked objects of its fingerprint,
byte for byte, and merged into the one that is equal, or linked itself when none is. Of two encodings of one block the
shorter stays. A run needs no memory of its own, and costs in proportion to the suspects; those that come behind its
position wait for the next.

    suspect, linked object of the same fingerprint
      same codec, same bytes   -> equal
      both raw, other bytes    -> different
      anything else            -> decode both and compare the blocks

Every comparison holds the pool's lock for about a microsecond; decoding happens outside it, on copies of objects that
are held (acquire) meanwhile. A step looks at up to `budget` suspects.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from nbdzram.engine.cells cimport kind_of, length_of, slot_of, unit_of
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.kit cimport gather_tallies
from nbdzram.engine.lock cimport lock_leave, lock_take, lock_take_behind
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.run cimport Run
from nbdzram.engine.slab cimport FOLDED, can_lie

from nbdzram.engine.compact import Compact

from nbdzram.engine.reports import FoldReport

__all__ = ["Compact", "Fold"]


@cython.final
cdef class Fold(Run):
    """See fold.pyi."""

    cdef bint dry_run
    cdef uint32_t position
    cdef uint32_t end
    cdef uint64_t merged
    cdef uint64_t freed
    cdef uint64_t compared

    def __cinit__(self, PoolCore pool, *, dry_run: bool = False):
        self.dry_run = dry_run
        self.cause = FOLDED
        self.position = 1
        lock_take(&pool.lock)
        gather_tallies(&pool.sides, pool.store)
        self.end = pool.store.cells.high
        self._total = pool.store.index.pending_count
        lock_leave(&pool.lock)

    def report(self):
        return FoldReport(
            objects_merged=self.merged, bytes_freed=self.freed, pages_returned=self.returned, comparisons=self.compared)

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        cdef uint32_t suspect
        cdef bint found
        while budget and self.position < self.end:
            budget -= 1
            self.pool.keep_short()
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
        if not self._can_lie(suspect):
            return  # it stays a suspect
        while other:
            if not self._can_lie(other):
                other = self.pool.store.index.find(fingerprint, other)
                continue
            self.compared += 1
            if self._same_bytes(suspect, other):
                self._merge(suspect, other)
                return
            if (kind_of(self.pool.store.cells.cell(suspect).word) == CODEC_RAW
                    and kind_of(self.pool.store.cells.cell(other).word) == CODEC_RAW):
                other = self.pool.store.index.find(fingerprint, other)
                continue
            turns = self.pool.store.index.turns
            if not self.pool.store.acquire(suspect):
                return  # without memory to count: it stays a suspect
            if not self.pool.store.acquire(other):
                self.pool.store.release(suspect)
                return
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

    cdef bint _can_lie(self, uint32_t handle) noexcept nogil:
        """Whether the object of this handle, which is no forward, lies where one of its size can be."""
        cdef uint64_t word = self.pool.store.cells.cell(handle).word
        return CODEC_RAW <= kind_of(word) < CODEC_ZSTD_DICT + CODEC_DICTS and can_lie(
            self.pool.store.slab, unit_of(word), slot_of(word), length_of(word))

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
        cdef bint turned = suspect_length < other_length
        cdef uint32_t loser = other if turned else suspect
        cdef uint32_t winner = suspect if turned else other
        if not self.pool.store.cells.can_count(winner, self.pool.store.cells.refs(loser)):
            return  # without memory to count: it stays a suspect
        if turned:
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
        self.pool.store.merge(loser, winner)

    cdef void _count(self, uint32_t loser) noexcept nogil:
        self.merged += 1
        self.freed += length_of(self.pool.store.cells.cell(loser).word)
