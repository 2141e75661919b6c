"""Looking for rot, at any pace: every object, then every block.

    objects   by handle: decoded without the lock, held against its fingerprint
    blocks    every entry of every export: whether it is right, and leads to an object that is

A check ends at the first thing that is wrong; this goes on, and names what cannot be read. Nothing is changed: a rotten
block is an error to whoever reads it, and right again when it is written. Its handle may be another object's then, so
that is looked at once more before a block is named.

Each hold of the lock copies one object or looks at up to HOLD entries. Remembered are ROTTEN_MAX objects and PLACES_MAX
blocks; what is beyond is counted: objects in the first phase, blocks in the second.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.cells cimport kind_of, length_of
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.cursor cimport Cursor, next_entry
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.kit cimport gather_tallies
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take_behind
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.run cimport Run

from nbdzram.engine.reports import ScrubReport

cdef enum:
    ROTTEN_MAX = 1024
    PLACES_MAX = 256
    FOUND_MAX = 64    # HOLD
    OBJECT_WORK = 64  # of an entry that is looked at: decoding and hashing take about 800 ns, looking 10


@cython.final
cdef class Scrub(Run):
    """See scrub.pyi."""

    cdef uint32_t handle                # the next one
    cdef uint64_t handles_end
    cdef bint in_objects
    cdef Cursor cursor                  # over `disk`
    cdef readonly uint64_t objects, objects_rotten, blocks, blocks_rotten
    cdef readonly bint finished
    cdef uint32_t rotten[ROTTEN_MAX]    # handles, in their order
    cdef uint32_t rotten_count
    cdef list disks                     # that are still to be looked at
    cdef Disk disk
    cdef readonly list places           # (export, block)
    cdef uint64_t found[FOUND_MAX]      # blocks, of one hold
    cdef uint32_t suspects[FOUND_MAX]   # of each the handle; 0: its entry is not right
    cdef uint32_t found_count

    def __cinit__(self, PoolCore pool):
        pool.reclaim_ripe()
        self.handle = 1
        self.in_objects = True
        self.places = []
        self.disks = pool.disks()
        lock_take_behind(&pool.lock)
        gather_tallies(&pool.sides, pool.store)  # again: what threads owe by now may make fewer than none of it
        self.handles_end = pool.store.cells.high
        self._total = self.handles_end + <uint64_t>OBJECT_WORK * pool.store.objects + pool.blocks_stored
        lock_leave(&pool.lock)

    def report(self):
        return ScrubReport(
            objects_checked=self.objects,
            objects_rotten=self.objects_rotten,
            blocks_checked=self.blocks,
            blocks_rotten=self.blocks_rotten,
        )

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        cdef uint32_t looked
        while budget:
            if self.in_objects:
                if self.handle >= self.handles_end:
                    return False
                looked = self._look_at_object()
            else:
                if self._is_behind() or self.found_count:
                    return False
                looked = self._look_at_blocks(min(budget, <uint32_t>HOLD))
            self._done += looked
            budget -= min(budget, looked)
        return True

    cdef bint _go_on(self) except -1:
        cdef uint32_t index
        for index in range(self.found_count):
            if len(self.places) < PLACES_MAX:
                self.places.append((self.disk.name, self.found[index]))
        self.found_count = 0
        if self.in_objects or self._is_behind():
            self.in_objects = False
            self.cursor.next = 0
            self.disk = self.disks.pop(0) if self.disks else None
            self.cursor.end = 0 if self.disk is None else self.disk.end_block()
            self.finished = self.disk is None
        return self.disk is not None

    cdef bint _is_behind(self) noexcept nogil:
        return self.disk is None or self.cursor.next >= self.cursor.end

    # -- objects -------------------------------------------------------------------------------------------------

    cdef uint32_t _look_at_object(self) noexcept nogil:
        cdef uint32_t handle = self.handle
        self.handle += 1
        if self._is_wrong(handle, False) and self._is_wrong(handle, True):  # it may have been given up meanwhile
            self.objects_rotten += 1
            if self.rotten_count < ROTTEN_MAX:
                self.rotten[self.rotten_count] = handle
                self.rotten_count += 1
        return OBJECT_WORK

    cdef bint _is_wrong(self, uint32_t handle, bint again) noexcept nogil:
        """Whether an object does not decode to the block whose fingerprint it has."""
        cdef uint8_t encoded[BLOCK]
        cdef uint8_t block[BLOCK]
        cdef uint64_t word, expected
        cdef bint sound = False
        lock_take_behind(&self.pool.lock)
        word = self.pool.store.cells.cell(handle).word
        expected = self.pool.store.cells.cell(handle).fingerprint
        if _is_object(word):
            sound = self.pool.store.is_sound(handle, handle)
            if sound:
                memcpy(encoded, self.pool.store.bytes_at(word), length_of(word))
        lock_leave(&self.pool.lock)
        if not _is_object(word):
            return False
        self.objects += not again
        return not (sound and self.pool.store.decode_right(kind_of(word), encoded, length_of(word), expected, block))

    # -- blocks --------------------------------------------------------------------------------------------------

    cdef uint32_t _look_at_blocks(self, uint32_t limit) noexcept nogil:
        """Of one leaf."""
        cdef uint64_t block, entry
        cdef uint32_t looked = 0, index, count
        lock_take_behind(&self.pool.lock)
        self.cursor.end = self.disk.end_block()  # it may have been resized
        self.disk.walk(&self.cursor)
        while looked < limit and next_entry(&self.cursor, &block, &entry):
            if self._is_suspect(entry, block, &self.suspects[self.found_count]):
                self.found[self.found_count] = block
                self.found_count += 1
            looked += 1
        lock_leave(&self.pool.lock)
        count, self.found_count = self.found_count, 0
        for index in range(count):
            if self.suspects[index] == 0 or self._is_wrong(self.suspects[index], True):
                self.found[self.found_count] = self.found[index]
                self.found_count += 1
        self.blocks_rotten += self.found_count
        self.blocks += looked
        return max(looked, <uint32_t>1)

    cdef bint _is_suspect(self, uint64_t entry, uint64_t block, uint32_t* handle_of) noexcept nogil:
        """Under the lock: whether an entry is not right, or leads to what was wrong, whose handle is given out."""
        cdef uint32_t handle, low = 0, high = self.rotten_count, middle
        handle_of[0] = 0
        if not self.pool.tables.is_right(entry, block):
            return True
        handle = self.pool.tables.handle_at(entry, block)
        if handle == 0:
            return False
        handle = self.pool.store.resolve(handle)
        while low < high:
            middle = (low + high) // 2
            if self.rotten[middle] < handle:
                low = middle + 1
            else:
                high = middle
        handle_of[0] = handle
        return low < self.rotten_count and self.rotten[low] == handle


cdef inline bint _is_object(uint64_t word) noexcept nogil:
    return CODEC_RAW <= kind_of(word) < CODEC_ZSTD_DICT + CODEC_DICTS
