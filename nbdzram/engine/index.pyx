"""The fingerprint index: which objects might be equal, known from the moment they are written.

    fingerprint -> bucket -> object -> object -> ...        linked objects: no two of them have equal content
                             pending bitmap, a bit a handle: objects whose fingerprint was there already

An object that comes in with a new fingerprint is linked. One whose fingerprint is present only gets its pending bit:
it may equal a linked one, and that is all that a fold has to look at. So a fold costs in proportion to the suspects
since the last one, needs no memory of its own, and a thousand equal blocks never stand in one chain.

Linear hashing (Litwin 1980): buckets split and merge one at a time as objects come and go, so no write waits for a
rehash. Three objects in two buckets: 2.7 bytes an object for heads, 4 for its link (which stands with the cells).

Invariants
1. Every object is linked or pending, never both.
2. Linked objects are pairwise different in content. (Equal content has an equal fingerprint, and the second one to
   come is pending until a fold has compared it.)

Not locked here: the pool's lock covers every call, but for insert_beside and remove_beside, which lock a bucket.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from nbdzram.engine.arena cimport region_ensure, region_expect, region_free, region_reserve, region_shrink
from nbdzram.engine.cells cimport Cells, handles_max
from nbdzram.engine.ledger cimport Ledger
from nbdzram.engine.latch cimport LATCHES, Latch, latch_leave, latch_take
from nbdzram.engine.lock cimport LOOKS, lock_pause
from nbdzram.engine.must cimport must
from nbdzram.engine.prefetch cimport prefetch, prefetch_to_write
from nbdzram.engine.publish cimport amend32, clear_bits, exchange32, look8, look32, set_bits, step_aside

from nbdzram.errors import ArenaError

cdef enum:
    MIN_BUCKETS = 1024  # a power of two

assert <int>MIN_BUCKETS >= <int>LATCHES  # so that a bucket has one latch

cdef extern from * nogil:
    int __builtin_ctzll(unsigned long long)


@cython.final
cdef class Index:
    """Over the objects among `cells`."""

    def __cinit__(self, Cells cells):
        self.cells = cells
        self.buckets = self.half = MIN_BUCKETS
        cdef Ledger* ledger = &cells.arena.ledger
        cdef uint64_t handles = handles_max(cells.arena)
        if (not region_reserve(&self.heads, max(handles, <uint64_t>MIN_BUCKETS) * sizeof(uint32_t), ledger)
                or not region_reserve(&self.pending, handles // 8 + 8, ledger)
                or not region_ensure(&self.heads, MIN_BUCKETS * sizeof(uint32_t)) or not self.reserve(1)):
            raise ArenaError("cannot reserve addresses for the fingerprint index; raise ulimit -v")
        self.latches = <Latch*>calloc(LATCHES, sizeof(Latch))
        if self.latches == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.latches)
        region_free(&self.heads)
        region_free(&self.pending)

    cdef uint64_t bucket_of(self, uint64_t fingerprint) noexcept nogil:
        """Without a lock, of two numbers that may be from before and after a split, it is a guess."""
        cdef uint64_t half = look32(&self.half)
        cdef uint64_t number = fingerprint & (2 * half - 1)
        return number if number < look32(&self.buckets) else number & (half - 1)

    cdef uint32_t* bucket(self, uint64_t number) noexcept nogil:
        """Where the first handle of a bucket stands."""
        return <uint32_t*>self.heads.base + number

    cdef void prefetch_bucket(self, uint64_t fingerprint) noexcept nogil:
        """Bring the bucket near while a block is being compressed, and its latch, which another writer had last. Needs
        no lock: a wrong guess costs nothing."""
        prefetch_to_write(self.bucket(self.bucket_of(fingerprint)))
        prefetch_to_write(self.latch(fingerprint))

    cdef void prefetch_chain(self, uint64_t fingerprint) noexcept nogil:
        """The same for the first object of a bucket that is near by now."""
        cdef uint32_t handle = self.bucket(self.bucket_of(fingerprint))[0]
        if handle:
            prefetch(self.cells.cell(handle))
            prefetch(self.cells.link(handle))

    cdef uint32_t first(self, uint64_t fingerprint) noexcept nogil:
        """The first linked object with this fingerprint, 0 is none."""
        return self.find(fingerprint, 0)

    cdef uint32_t find(self, uint64_t fingerprint, uint32_t after) noexcept nogil:
        """The next linked object with this fingerprint behind `after` (0: from the beginning), 0 is none."""
        cdef uint32_t handle = self.cells.link(after)[0] if after else self.bucket(self.bucket_of(fingerprint))[0]
        while handle and self.cells.cell(handle).fingerprint != fingerprint:
            handle = self.cells.link(handle)[0]
        return handle

    cdef bint reserve(self, uint32_t handle) noexcept nogil:
        """Make sure that insert cannot fail for this handle."""
        return region_ensure(&self.pending, (<uint64_t>handle // 64 + 1) * 8)

    cdef void insert(self, uint32_t handle) noexcept nogil:
        """Link a new object, or mark it as one that a fold has to look at."""
        if self.first(self.cells.cell(handle).fingerprint):
            self.set_pending(handle)
        else:
            self.link(handle)

    cdef void link(self, uint32_t handle) noexcept nogil:
        self.fit(1)
        self._put(handle)

    cdef void _put(self, uint32_t handle) noexcept nogil:
        cdef uint32_t* head = self.bucket(self.bucket_of(self.cells.cell(handle).fingerprint))
        self.cells.link(handle)[0] = head[0]
        head[0] = handle
        self.linked += 1

    cdef void remove(self, uint32_t handle) noexcept nogil:
        """Forget an object; its cell still has its fingerprint."""
        if self.is_pending(handle):
            self.clear_pending(handle)
        else:
            self._unlink(handle)

    cdef void _unlink(self, uint32_t handle) noexcept nogil:
        self._take_out(handle, self.cells.cell(handle).fingerprint)
        self.linked -= 1
        self.fit(1)

    cdef bint fit(self, uint32_t limit) noexcept nogil:
        """Split or merge up to `limit` buckets, as linked objects came and went; whether it took that many.

        The count is signed: kits (kit.pyx) may hold back some that came when those that went are counted.
        """
        while limit and not self.fits():
            if <int64_t>self.linked * 2 < <int64_t>self.buckets:
                self._merge()
            elif not self._split():
                return False
            limit -= 1
        return limit == 0

    cdef bint fits(self) noexcept nogil:
        """Whether there are buckets enough, and not too many. Beside others the depot's lock is held."""
        cdef int64_t linked = <int64_t>self.linked
        return linked * 2 < <int64_t>self.buckets * 3 and (
            linked * 2 >= <int64_t>self.buckets or self.buckets == MIN_BUCKETS)

    # -- an arena opened again (opening.pyx): all of its objects at once ----------------------------------------------

    cdef void expect(self, uint64_t objects) noexcept nogil:
        """Have a bucket for each of so many before the first one comes: to split for each, with every chain moved that
        is in a cache no more, was a fifth of an opening. Without memory for them the chains are longer until fit.
        """
        if objects > self.buckets and objects < <uint32_t>-1 and region_ensure(
                &self.heads, objects * sizeof(uint32_t)):
            must(self.linked == 0, b"buckets are made before objects come")
            region_expect(&self.heads, objects * sizeof(uint32_t))
            self.buckets = <uint32_t>objects
            while <uint64_t>2 * self.half <= objects:
                self.half *= 2
            must(self.half <= self.buckets and self.buckets // 2 < self.half,
                 b"the half is the last power of two that is not above the buckets")

    cdef bint adopt(self, uint32_t handle, uint64_t fingerprint) noexcept nogil:
        """insert, with the buckets that there are, while other threads do so too and nobody removes; `fit` is called
        when all are in. Whether it was linked; the caller counts."""
        cdef uint32_t* bucket = self.bucket(self.bucket_of(fingerprint))
        cdef uint32_t head, other
        cdef uint32_t looked = 0  # what stands from here on in the chain is another's
        while True:
            head = other = look32(bucket)
            while other != looked:
                if self.cells.cell(other).fingerprint == fingerprint:
                    set_bits(self.pending.base + (handle >> 3), 1 << (handle & 7))
                    return False
                other = self.cells.link(other)[0]
            self.cells.link(handle)[0] = head
            step_aside()
            if exchange32(bucket, head, handle):
                return True
            looked = head

    # -- beside others (beside.pyx): buckets are neither split nor merged there ---------------------------------------

    cdef Latch* latch(self, uint64_t fingerprint) noexcept nogil:
        """The lock of a bucket, and of others: there are fewer locks than buckets, and both count from the lowest
        bits."""
        return self.latches + (fingerprint & (LATCHES - 1))

    cdef bint insert_beside(self, uint32_t handle, uint64_t fingerprint) noexcept nogil:
        """insert. Whether it was linked; the caller counts."""
        cdef Latch* latch = self.latch(fingerprint)
        cdef uint32_t* head
        cdef bint found
        latch_take(latch)
        found = self.first(fingerprint) != 0
        if self.pausing:
            lock_pause()
        if found:
            set_bits(self.pending.base + (handle >> 3), 1 << (handle & 7))
        else:
            head = self.bucket(self.bucket_of(fingerprint))
            self.cells.link(handle)[0] = head[0]
            head[0] = handle
        latch_leave(latch)
        return not found

    cdef bint remove_beside(self, uint32_t handle, uint64_t fingerprint) noexcept nogil:
        """remove. Whether it was linked; the caller counts."""
        cdef Latch* latch
        if look8(self.pending.base + (handle >> 3)) >> (handle & 7) & 1:
            clear_bits(self.pending.base + (handle >> 3), 1 << (handle & 7))
            return False
        latch = self.latch(fingerprint)
        latch_take(latch)
        self._take_out(handle, fingerprint)
        latch_leave(latch)
        return True

    cdef void _take_out(self, uint32_t handle, uint64_t fingerprint) noexcept nogil:
        cdef uint32_t* place = self.bucket(self.bucket_of(fingerprint))
        while place[0] != handle:
            must(place[0] != 0, b"an object that is not pending stands in its bucket")  # or this would never end
            place = self.cells.link(place[0])
        if self.pausing:
            lock_pause()
        place[0] = self.cells.link(handle)[0]

    cdef bint is_pending(self, uint32_t handle) noexcept nogil:
        return ((<uint64_t*>self.pending.base)[handle >> 6] >> (handle & 63)) & 1

    cdef void set_pending(self, uint32_t handle) noexcept nogil:
        self.cells.changes(handle)
        (<uint64_t*>self.pending.base)[handle >> 6] |= <uint64_t>1 << (handle & 63)
        self.pending_count += 1

    cdef void clear_pending(self, uint32_t handle) noexcept nogil:
        self.cells.changes(handle)
        (<uint64_t*>self.pending.base)[handle >> 6] &= ~(<uint64_t>1 << (handle & 63))
        self.pending_count -= 1

    cdef bint next_pending(self, uint32_t* handle) noexcept nogil:
        """Move handle[0] on to the first pending one. False: it has not come to one, but behind the last handle, or so
        far on that the lock is to be let go."""
        cdef uint64_t word = handle[0] >> 6
        cdef uint64_t end = min((<uint64_t>self.cells.high + 63) >> 6, self.pending.committed // 8)
        cdef uint64_t stop = min(end, word + LOOKS)
        cdef uint64_t bits
        if word < end:
            bits = (<uint64_t*>self.pending.base)[word] >> (handle[0] & 63) << (handle[0] & 63)
            while bits == 0 and word + 1 < stop:
                word += 1
                bits = (<uint64_t*>self.pending.base)[word]
            if bits:
                handle[0] = <uint32_t>(word * 64 + __builtin_ctzll(bits))
                return True
        handle[0] = <uint32_t>(stop * 64) if stop < end else self.cells.high
        return False

    cdef bint _split(self) noexcept nogil:
        """Share the next bucket in line with a new one at the end. Without memory, or at the limit, the chains just
        grow."""
        cdef uint32_t fresh = self.buckets
        cdef uint32_t handle, following
        cdef uint32_t* old_head
        cdef uint32_t* new_head
        if fresh == <uint32_t>-1 or not region_ensure(&self.heads, (<uint64_t>fresh + 1) * sizeof(uint32_t)):
            return False
        old_head = <uint32_t*>self.heads.base + (fresh - self.half)
        new_head = <uint32_t*>self.heads.base + fresh
        self.turns += 1
        amend32(&self.buckets, self.buckets + 1)
        if self.buckets == 2 * self.half:
            amend32(&self.half, 2 * self.half)
        handle = old_head[0]
        old_head[0] = 0
        new_head[0] = 0
        while handle:
            following = self.cells.link(handle)[0]
            new_head = self.bucket(self.bucket_of(self.cells.cell(handle).fingerprint))
            self.cells.link(handle)[0] = new_head[0]
            new_head[0] = handle
            handle = following
        return True

    cdef void _merge(self) noexcept nogil:
        """Undo the last split."""
        cdef uint32_t last = self.buckets - 1
        cdef uint32_t* place
        self.turns += 1
        if self.buckets == self.half:
            amend32(&self.half, self.half // 2)
        place = <uint32_t*>self.heads.base + (last - self.half)
        while place[0]:
            place = self.cells.link(place[0])
        place[0] = (<uint32_t*>self.heads.base)[last]
        (<uint32_t*>self.heads.base)[last] = 0
        amend32(&self.buckets, last)
        region_shrink(&self.heads, <uint64_t>last * sizeof(uint32_t))

    cdef uint64_t pages(self) noexcept nogil:
        """Pages of heads and pending bits."""
        return self.heads.pages + self.pending.pages
