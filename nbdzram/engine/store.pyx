"""Objects: stored bytes with a handle, counted, found by fingerprint, immutable in content.

    handle -> cell (cells.pyx) -> slot (slab.pyx) -> bytes
                 |
                 +-- fingerprint -> index (index.pyx)

What may change behind a handle is where the bytes lie (move), how they are encoded (replace) and with whom they are
shared (merge); never the block that they decode to. Each such change is one store of a cell's word.

A cell has no room for a check of its word, so memory that fails may make it name any place. Whoever frees, moves,
merges or encodes what a cell leads to has looked first whether it can be there (is_whole): a bit that flipped costs the
blocks of that cell, or of another object of its size, and not the process.

Not locked here: the pool's lock covers every call. Threads that write beside each other put and release objects by
themselves (beside.pyx).
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.arena cimport Arena, Region, region_ensure, region_free, region_reserve
from nbdzram.engine.cells cimport (
    KIND_FILL, KIND_FORWARD, REFS_SHIFT, Cell, Cells, fill_word, handles_max, kind_of, length_of, object_word,
    refs_bits, slot_of, target_of, unit_of,
)
from nbdzram.engine.codec cimport (
    BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT, fingerprint, lz4_decompress, zstd_decompress,
    zstd_free_ddict,
)
from nbdzram.engine.domain cimport is_fingerprint_of
from nbdzram.engine.index cimport Index
from nbdzram.engine.ledger cimport ledger_give
from nbdzram.engine.lock cimport lock_end, lock_init
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.publish cimport clear_bits, look8, look32, look64, publish64, set_bits
from nbdzram.engine.slab cimport COMPACTED, FOLDED, RECOMPRESSED, RELEASED, Slab, can_lie

from nbdzram.errors import ArenaError


@cython.final
@cython.no_gc_clear
cdef class ObjectStore:
    """The objects of one arena."""

    def __cinit__(self, Arena arena, uint64_t directory):
        self.arena = arena
        self.slab = Slab(arena)
        self.cells = Cells(arena, directory)
        self.index = Index(self.cells)
        lock_init(&self.depot, 0)
        self.depot_made = True
        if not region_reserve(&self.tried, handles_max(arena) // 8 + 1, &arena.ledger):
            raise ArenaError("cannot reserve addresses for the object store; raise ulimit -v")

    def __dealloc__(self):
        cdef int number
        region_free(&self.tried)
        if self.depot_made:
            lock_end(&self.depot)
        for number in range(CODEC_DICTS):
            zstd_free_ddict(self.ddicts[number])

    cdef void _count(self, uint64_t word, int sign) noexcept nogil:
        """Add an object to the counters, or take it out."""
        self.objects += sign
        self.bytes_of[kind_of(word)] += <int64_t>sign * length_of(word)
        if kind_of(word) == CODEC_RAW:
            self.huge_now += sign

    cdef void _forget(self, uint32_t handle, uint64_t word) noexcept nogil:
        """An object goes: its handle may be another's soon."""
        self._count(word, -1)
        if self.was_tried(handle):
            self.forget_tried(handle)
            if kind_of(word) == CODEC_LZ4:
                self.tried_bytes -= length_of(word)

    cdef void forget_tried(self, uint32_t handle) noexcept nogil:
        """What stands beside its bit may be changed by others at the same moment."""
        clear_bits(self.tried.base + (handle >> 3), 1 << (handle & 7))

    cdef uint32_t put(
        self, const uint8_t* encoded, uint32_t length, uint32_t kind, uint64_t fingerprint
    ) noexcept nogil:
        """Store a new object with one holder. Its handle, or 0 when there is no room; nothing changed then."""
        cdef uint32_t unit, slot, handle
        cdef Cell* cell
        # The slot last: to free one again would leave spare pages, which look like room to a write that is refused.
        handle = self.cells.alloc()
        if handle == 0 or not self.index.reserve(handle) or not self.slab.alloc(length, &unit, &slot):
            if handle:
                self.cells.free(handle)
            return 0
        memcpy(self.arena.base + self.slab.offset_of(unit, slot, length), encoded, length)
        cell = self.cells.cell(handle)
        cell.fingerprint = fingerprint
        publish64(&cell.word, object_word(kind, length, slot, unit) | <uint64_t>1 << REFS_SHIFT)
        self.index.insert(handle)
        self._count(cell.word, 1)
        if kind == CODEC_RAW:
            self.huge_ever += 1
        return handle

    cdef uint32_t put_fill(self, uint64_t word) noexcept nogil:
        """A handle for a repeated word that a block table entry cannot hold itself. 0 when there is no room."""
        cdef uint32_t handle = self.cells.alloc()
        cdef Cell* cell
        if handle == 0:
            return 0
        cell = self.cells.cell(handle)
        cell.fingerprint = word
        publish64(&cell.word, fill_word(self.seed, word) | <uint64_t>1 << REFS_SHIFT)
        return handle

    cdef uint32_t resolve(self, uint32_t handle) noexcept nogil:
        """The handle of the object (or fill) that `handle` leads to; of a forward, if it leads nowhere (see
        is_sound)."""
        cdef uint64_t word = look64(&self.cells.cell(handle).word)
        cdef int steps = 0
        while kind_of(word) == KIND_FORWARD and target_of(word) < look32(&self.cells.high) and steps < FORWARDS_MAX:
            handle = target_of(word)
            word = look64(&self.cells.cell(handle).word)
            steps += 1
        return handle

    cdef bint is_sound(self, uint32_t first, uint32_t last) noexcept nogil:
        """Whether `last`, which `first` resolves to, is a cell of the same content, whose bytes lie in the arena."""
        cdef uint64_t word = self.cells.cell(last).word
        cdef uint32_t kind = kind_of(word)
        if self.cells.cell(first).fingerprint != self.cells.cell(last).fingerprint:
            return False
        if kind == KIND_FILL:
            return word << 9 >> 9 == fill_word(self.seed, self.cells.cell(last).fingerprint)
        return CODEC_RAW <= kind < CODEC_ZSTD_DICT + CODEC_DICTS and (
            self.slab.offset_of(unit_of(word), slot_of(word), length_of(word)) + length_of(word)
            <= <uint64_t>self.arena.unit_high * UNIT_SIZE)

    cdef bint is_whole(self, uint32_t first) noexcept nogil:
        """Whether `first` leads to a cell of the same content, whose bytes lie in a slot that can be its. Otherwise
        memory changed under us."""
        cdef uint32_t last = self.resolve(first)
        cdef uint64_t word = self.cells.cell(last).word
        return self.is_sound(first, last) and (
            kind_of(word) == KIND_FILL or can_lie(self.slab, unit_of(word), slot_of(word), length_of(word)))

    cdef bint acquire(self, uint32_t handle) noexcept nogil:
        """One holder more of a handle, and of everything that it leads through. False: no memory to count it, or it is
        not whole; nothing changed then."""
        cdef uint64_t word = self.cells.cell(handle).word
        cdef uint64_t refs
        if not self.is_whole(handle) or not self._can_count(handle):
            return False
        while kind_of(word) == KIND_FORWARD:
            self.cells.add_refs(handle, 1)
            handle = target_of(word)
            word = self.cells.cell(handle).word
        if kind_of(word) != KIND_FILL:
            refs = word >> REFS_SHIFT
            if refs == 1:
                self.shared_objects += 1
            self.shared_bytes += length_of(word)
        self.cells.add_refs(handle, 1)
        return True

    cdef bint _can_count(self, uint32_t handle) noexcept nogil:
        """Make sure that a handle, and everything that it leads through, can have one holder more."""
        cdef uint64_t word = self.cells.cell(handle).word
        while kind_of(word) == KIND_FORWARD and self.cells.can_count(handle, 1):
            handle = target_of(word)
            word = self.cells.cell(handle).word
        return kind_of(word) != KIND_FORWARD and self.cells.can_count(handle, 1)

    cdef void release(self, uint32_t handle) noexcept nogil:
        """One holder less; what nothing leads to any more is freed. What is not whole stays, and so does its slot:
        another's would be freed."""
        cdef uint64_t word
        cdef bint last
        if not self.is_whole(handle):
            return
        while True:
            word = self.cells.cell(handle).word
            last = self.cells.drop_ref(handle)
            if kind_of(word) != KIND_FORWARD:
                break
            if last:
                self.cells.retire(handle)
            handle = target_of(word)
        if kind_of(word) == KIND_FILL:
            if last:
                self.cells.retire(handle)
        elif last:
            self.index.remove(handle)
            self._forget(handle, word)
            self.cells.retire(handle)
            self.slab.retire(unit_of(word), slot_of(word), RELEASED)
        else:
            self.shared_bytes -= length_of(word)
            if self.cells.cell(handle).word >> REFS_SHIFT == 1:
                self.shared_objects -= 1

    cdef const uint8_t* bytes_at(self, uint64_t word) noexcept nogil:
        """Where the object of this cell word lies."""
        return self.arena.base + self.slab.offset_of(unit_of(word), slot_of(word), length_of(word))

    cdef bint decode(self, uint32_t kind, const uint8_t* encoded, uint32_t length, uint8_t* block) noexcept nogil:
        """An object's bytes to its block. False when they are none: memory changed under us. Needs no lock."""
        if kind == CODEC_LZ4:
            return lz4_decompress(encoded, length, block)
        if kind == CODEC_RAW:
            memcpy(block, encoded, BLOCK)
            return length == BLOCK
        if kind == CODEC_ZSTD:
            return zstd_decompress(NULL, encoded, length, block)
        if kind >= CODEC_ZSTD_DICT and kind < CODEC_ZSTD_DICT + CODEC_DICTS:
            return zstd_decompress(self.ddicts[kind - CODEC_ZSTD_DICT], encoded, length, block)
        return False

    cdef bint decode_right(
        self, uint32_t kind, const uint8_t* encoded, uint32_t length, uint64_t fingerprint, uint8_t* block
    ) noexcept nogil:
        """decode, and only to the block that was stored. Needs no lock."""
        return self.decode(kind, encoded, length, block) and self.is_block(block, fingerprint)

    cdef bint is_block(self, const uint8_t* block, uint64_t expected) noexcept nogil:
        """Whether a block has the fingerprint that its object's cell says."""
        return is_fingerprint_of(expected, fingerprint(block, self.seed) & self.fingerprint_mask)

    cdef void merge(self, uint32_t loser, uint32_t winner) noexcept nogil:
        """Fold: `loser` becomes a forward to `winner`, whose content is equal, and its bytes are freed.

        Neither is a forward; the loser stands in the index no more, and the winner does and can count the loser's
        holders.
        """
        cdef Cell* cell = self.cells.cell(loser)
        cdef uint64_t word = cell.word
        cdef uint64_t refs = self.cells.refs(loser)
        cdef uint64_t winner_word = self.cells.cell(winner).word
        if word >> REFS_SHIFT > 1:
            self.shared_objects -= 1
            self.shared_bytes -= (refs - 1) * length_of(word)
        if winner_word >> REFS_SHIFT == 1:
            self.shared_objects += 1
        self.shared_bytes += refs * length_of(winner_word)
        self.cells.add_refs(winner, refs)
        self.cells.changes(loser)
        publish64(&cell.word, KIND_FORWARD | <uint64_t>winner << 4 | refs_bits(word))
        self._forget(loser, word)
        self.slab.retire(unit_of(word), slot_of(word), FOLDED)
        self.folded += 1

    cdef bint move(self, uint32_t handle) noexcept nogil:
        """Copy an object to another slot of its class. False when there is no room for it."""
        cdef Cell* cell = self.cells.cell(handle)
        cdef uint64_t word = cell.word
        cdef uint32_t unit, slot
        cdef uint32_t length = length_of(word)
        if not self._take_slot(length, &unit, &slot, COMPACTED):
            return False
        memcpy(self.arena.base + self.slab.offset_of(unit, slot, length), self.bytes_at(word), length)
        self.cells.changes(handle)
        publish64(&cell.word, object_word(kind_of(word), length, slot, unit) | refs_bits(word))
        self.slab.retire(unit_of(word), slot_of(word), COMPACTED)
        self.moved += 1
        return True

    cdef bint replace(self, uint32_t handle, const uint8_t* encoded, uint32_t length, uint32_t kind) noexcept nogil:
        """Store an object's other encoding in its place. False when there is no room; nothing changed then."""
        cdef Cell* cell = self.cells.cell(handle)
        cdef uint64_t word = cell.word
        cdef uint32_t unit, slot
        if not self._take_slot(length, &unit, &slot, RECOMPRESSED):
            return False
        memcpy(self.arena.base + self.slab.offset_of(unit, slot, length), encoded, length)
        if word >> REFS_SHIFT > 1:
            self.shared_bytes += (self.cells.refs(handle) - 1) * (<int64_t>length - <int64_t>length_of(word))
        self.cells.changes(handle)
        publish64(&cell.word, object_word(kind, length, slot, unit) | refs_bits(word))
        self._forget(handle, word)
        self._count(cell.word, 1)
        self.slab.retire(unit_of(word), slot_of(word), RECOMPRESSED)
        self.recompressed += 1
        return True

    cdef bint _take_slot(self, uint32_t length, uint32_t* unit, uint32_t* slot, int cause) noexcept nogil:
        """A slot for what lies elsewhere now; a page that it takes is counted against what `cause` returns."""
        cdef bint taken
        self.slab.cause = cause
        taken = self.slab.alloc(length, unit, slot)
        self.slab.cause = RELEASED
        return taken

    cdef Region begin_trying(self, int strength, Region fresh) noexcept nogil:
        """A recompression begins that is stronger than any that tried what is remembered, and tries everything again.
        `fresh` is as large as that, which is the caller's now."""
        cdef Region forgotten = self.tried
        ledger_give(&self.arena.ledger, forgotten.pages)
        self.tried_strength = strength
        self.tried_bytes = 0
        self.tried = fresh
        return forgotten

    cdef bint was_tried(self, uint32_t handle) noexcept nogil:
        return handle >> 3 < self.tried.committed and look8(self.tried.base + (handle >> 3)) >> (handle & 7) & 1

    cdef void set_tried(self, uint32_t handle) noexcept nogil:
        """Remember that an object, which was not tried before, is as small as this recompression makes it."""
        cdef uint64_t word = self.cells.cell(handle).word
        if region_ensure(&self.tried, (<uint64_t>handle >> 3) + 1):
            self.tried.base[handle >> 3] |= 1 << (handle & 7)
            if kind_of(word) == CODEC_LZ4:
                self.tried_bytes += length_of(word)

    cdef bint expect_tried(self) noexcept nogil:
        """Have room to note that of any object in an arena opened again. False without memory: none was tried then."""
        return region_ensure(&self.tried, (<uint64_t>self.cells.high >> 3) + 1)

    cdef void adopt_tried(self, uint32_t handle) noexcept nogil:
        """Remember that of an object which recompression made; others do so of other handles at the same moment."""
        if handle >> 3 < self.tried.pages * PAGE_SIZE:
            set_bits(self.tried.base + (handle >> 3), 1 << (handle & 7))
