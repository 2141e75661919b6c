"""Recompression: objects that rest are stored again with Zstandard, where that needs a smaller slot.

A run goes through the block tables of the pool's exports, as only their entries know when a block was last used. Each
object is held, decoded, held against its fingerprint, and encoded again outside the lock; it is replaced in its place
if the new encoding falls into a smaller size class. The handle stays, and so does everything that leads to it. What was
tried is remembered in a bit a handle, so that the next run passes over it, unless it is stronger: has a higher level,
or the first dictionary, than any of those that tried what is remembered. What does not match its fingerprint stays as
it is: a new encoding would make rot true.

A dictionary is trained (COVER, zdict.h) from blocks of the pool itself, spread evenly over its handles, none of them
of a private export. It is written into units of its own before the superblock names the first; cells say which
dictionary an object needs (codec.pxd). Its size follows the pool's, as the arena and Zstandard hold one copy each:

    dictionary, KiB              0     32     64    128    256    512     zstandard 0.23, level 3; MiB of distinct
    ext4, three Pythons       28.6   27.1   26.8   26.2   26.0   25.8     blocks by `make bench-memory`'s images, in
    memory of 4 processes     18.2   16.8   16.6   16.2   15.9   15.6     slots of 16 bytes; decoding takes as long
    text                      9.05   8.01   7.89   7.75   7.57   7.45     with each of them, 7 to 11 us a block

Known limits: an object that several entries share counts as idle when any of them is. A dictionary in use stays as it
is; another is trained when none is in use, at most four in a process's life. Opening an arena forgets the unused ones,
and what was tried in vain.
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from nbdzram.engine.arena cimport Region, region_free, region_reserve
from nbdzram.engine.cells cimport kind_of, length_of
from nbdzram.engine.codec cimport (
    BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT, fingerprint, zstd_compress,
    zstd_free_cdict, zstd_free_compressor, zstd_new_cdict, zstd_new_compressor, zstd_train,
)
from nbdzram.engine.cursor cimport Cursor, next_entry
from nbdzram.engine.dictionary cimport LARGEST_DICTIONARY, NO_DICTIONARY, keep_dictionary
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.domain cimport COMMON_DOMAIN, salt_of
from nbdzram.engine.format cimport KEY_STRENGTH, checked_word, dictionary_length, dictionary_unit
from nbdzram.engine.kit cimport gather_tallies
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.must cimport must
from nbdzram.engine.page cimport UNIT_SIZE
from nbdzram.engine.publish cimport look32, publish64
from nbdzram.engine.run cimport Run
from nbdzram.engine.slab cimport RECOMPRESSED
from nbdzram.engine.table cimport AGE_OLDEST, AGE_SECONDS, age_of, is_hole
from nbdzram.engine.users cimport users_enter, users_leave

from nbdzram.engine.reports import RecompressReport
from nbdzram.errors import EngineError, UserError

cdef enum:
    SMALLEST_DICTIONARY = 32 << 10
    DICTIONARY_SHARE = 128     # of the pool's compressed bytes: one of so many
    SAMPLES = 4096             # 16 MiB: zdict.h asks for a hundred times the dictionary, and gains little beyond
    FEWEST_SAMPLES = 256
    ENCODING_WORK = 1 << 10    # of an entry that is passed over: 20 to 60 ns beside 20 us at level 1 and 2 ms at 19

MIN_LEVEL, MAX_LEVEL = 1, 22  # zstd.h: ZSTD_maxCLevel()


@cython.final
cdef class Recompress(Run):
    """See recompress.pyi."""

    cdef list disks          # that are still to be walked
    cdef Disk disk
    cdef Cursor cursor       # over `disk`
    cdef uint32_t counted, cells_end  # handles before `cells_end` among which what is due is counted first
    cdef uint64_t due                 # objects that the walk is still expected to encode
    cdef int level, strength
    cdef uint32_t idle       # units of age (table.pxd)
    cdef bint huge_only
    cdef bint wants_dictionary
    cdef int dictionary      # its number, or NO_DICTIONARY
    cdef void* compressor
    cdef void* cdict
    cdef uint64_t seen, replaced, before, after

    def __cinit__(self, PoolCore pool, *, level: int = 3, idle_seconds: int = 0, huge_only: bool = False,
                  dictionary: bool = False):
        if not MIN_LEVEL <= level <= MAX_LEVEL:
            raise UserError(f"Zstandard level {level} is outside {MIN_LEVEL} .. {MAX_LEVEL}")
        self.level = level
        self.cause = RECOMPRESSED
        # A unit more than asked: the one in which a block was used has been going on for nobody knows how long.
        self.idle = min((idle_seconds + AGE_SECONDS - 1) // AGE_SECONDS + 1, AGE_OLDEST) if idle_seconds else 0
        self.huge_only = huge_only
        self.wants_dictionary = dictionary
        self.dictionary = NO_DICTIONARY
        self.compressor = zstd_new_compressor(level)
        if self.compressor == NULL:
            raise MemoryError
        self.disks = pool.disks()
        self._go_on()
        self.strength = level + (MAX_LEVEL if dictionary else 0)
        self._begin_trying()

    def _begin_trying(self):
        """A stronger recompression than all before it tries everything again."""
        cdef Region forgotten
        cdef Region fresh
        if not users_enter(&self.pool.users):
            raise EngineError("a recompression cannot begin: its pool was closed")
        if not region_reserve(&fresh, self.pool.store.tried.reserved, &self.pool.arena.ledger):
            users_leave(&self.pool.users)
            raise EngineError("cannot reserve addresses for a recompression; raise ulimit -v")
        lock_take(&self.pool.lock)
        self.counted = 1
        self.cells_end = self.pool.store.cells.high
        self._total = self.cells_end - 1 + self.pool.blocks_stored
        forgotten = fresh
        if self.strength > self.pool.store.tried_strength:
            forgotten = self.pool.store.begin_trying(self.strength, fresh)
            self._publish_strength()
        lock_leave(&self.pool.lock)
        region_free(&forgotten)  # outside the lock: a page of it takes a microsecond of the system
        users_leave(&self.pool.users)

    def __dealloc__(self):
        if self.compressor != NULL:
            zstd_free_compressor(self.compressor)
        zstd_free_cdict(self.cdict)

    def report(self):
        return RecompressReport(
            objects_seen=self.seen,
            objects_recompressed=self.replaced,
            bytes_before=self.before,
            bytes_after=self.after,
            pages_returned=max(<int64_t>0, self.returned),
            dictionary_bytes=0 if self.dictionary == NO_DICTIONARY
            else dictionary_length(self.pool.superblock, self.dictionary),
        )

    # -- the walk ------------------------------------------------------------------------------------------------

    cdef bint _go_on(self) except -1:
        self.disk = self.disks.pop(0) if self.disks else None
        self.cursor.next = 0
        return self.disk is not None

    cdef bint _step(self, uint32_t budget) noexcept nogil:
        while budget and self.counted < self.cells_end:
            budget -= self._count_due(min(budget, <uint32_t>HOLD))
        if self.counted < self.cells_end:
            return True
        if self.wants_dictionary:
            self.wants_dictionary = False
            self._find_dictionary()
            return True
        return self.disk is not None and self._visit_disk(self.disk, budget)

    cdef uint32_t _count_due(self, uint32_t limit) noexcept nogil:
        """Count, of up to `limit` handles, the objects that no run has tried; how many were looked at.

        Entries alone do not tell how long a run takes: a thousand may lead to one object, and a block of most of them
        may have been tried.
        """
        cdef uint32_t end = <uint32_t>min(<uint64_t>self.counted + limit, self.cells_end)
        cdef uint32_t looked = end - self.counted
        lock_take_behind(&self.pool.lock)
        while self.counted < end:
            if (self._is_worth_trying(kind_of(self.pool.store.cells.cell(self.counted).word))
                    and not self.pool.store.was_tried(self.counted)):
                self.due += 1
                self._total += ENCODING_WORK
            self.counted += 1
        lock_leave(&self.pool.lock)
        self._done += looked
        return looked

    cdef bint _is_worth_trying(self, uint32_t kind) noexcept nogil:
        return kind == CODEC_RAW or _is_compressed(kind) and not self.huge_only

    cdef void _expect(self, int64_t encodings) noexcept nogil:
        """An object was reached that is encoded (1) or passed over (0): the total was told with those that are due."""
        if self.due:
            self.due -= 1
            encodings -= 1
        self._total += encodings * ENCODING_WORK

    cdef bint _visit_disk(self, Disk disk, uint32_t budget) noexcept nogil:
        """Go on where the last step ended. False when the disk is done."""
        cdef uint64_t block, entry = 0
        cdef uint32_t handle
        cdef uint64_t done, cost
        cdef bint found
        self.cursor.end = disk.end_block()  # it may have been resized
        while budget:
            self.pool.keep_short()
            lock_take_behind(&self.pool.lock)
            done = self._done
            found = disk.walk(&self.cursor)
            handle = 0
            while handle == 0 and next_entry(&self.cursor, &block, &entry):
                handle = self.pool.tables.handle_at(entry, block)
                self._done += not is_hole(entry)
            if handle:
                self._visit(handle, age_of(entry, self.pool.now))
            lock_leave(&self.pool.lock)
            if not found and self.cursor.next >= self.cursor.end:
                return False
            # An encoding is as much as a thousand entries that are passed over: a budget that grew with those would be
            # minutes of encodings, and a run that nobody can pause or cancel. Holes, of which any number may be, count.
            cost = max(self._done - done, <uint64_t>1)
            budget -= <uint32_t>min(cost, <uint64_t>budget)
        return True

    cdef void _visit(self, uint32_t first, uint32_t age) noexcept nogil:
        """Encode again the object that an entry leads to, if it is due. Holds the lock, and lets it go to work."""
        cdef uint8_t encoded[BLOCK]
        cdef uint8_t block[BLOCK]
        cdef uint8_t better[BLOCK]
        cdef uint8_t again[BLOCK]
        cdef uint32_t handle = self.pool.store.resolve(first)
        cdef uint64_t word = self.pool.store.cells.cell(handle).word
        cdef uint64_t fingerprint = self.pool.store.cells.cell(handle).fingerprint
        cdef uint32_t kind = kind_of(word)
        cdef uint32_t length = length_of(word)
        cdef bint right
        cdef uint32_t better_kind = 0
        cdef uint32_t better_length = 0
        if not self._is_worth_trying(kind) or self.pool.store.was_tried(handle):
            return
        if age < self.idle or not self.pool.store.is_whole(first) or not self.pool.store.acquire(handle):
            self._expect(0)
            return
        self._expect(1)
        self._done += ENCODING_WORK
        self.seen += 1
        memcpy(encoded, self.pool.store.bytes_at(word), length)
        lock_leave(&self.pool.lock)
        # What goes is proved to be what was written: of rot, a new encoding would make truth.
        right = self.pool.store.decode_right(kind, encoded, length, fingerprint, block)
        if right:
            better_length = self._encode(block, better, length, &better_kind)
        # The old encoding goes: what does not read back now never will. Decoding is quick beside encoding twice.
        if better_length and not (self.pool.store.decode(better_kind, better, better_length, again)
                                  and memcmp(again, block, BLOCK) == 0):
            better_length = 0
        lock_take_behind(&self.pool.lock)
        if not right:
            self.pool.rotten += 1
            self.pool.rotten_export = self.disk.number
            self.pool.rotten_block = self.cursor.next - 1
        elif self.pool.store.cells.refs(handle) > 1:  # somebody beside us still holds it
            if not (better_length and self.pool.store.slab.saves(length, better_length)):
                self._set_tried(handle)
            elif self.pool.store.replace(handle, better, better_length, better_kind):
                self._set_tried(handle)
                self.replaced += 1
                self.before += length
                self.after += better_length
        self.pool.store.release(handle)

    cdef void _set_tried(self, uint32_t handle) noexcept nogil:
        """Under the lock: the next run as strong passes over it. One that is stronger does not, though one as strong as
        that was here before."""
        self.pool.store.set_tried(handle)
        if self.strength < self.pool.store.tried_strength:
            self.pool.store.tried_strength = self.strength
            self._publish_strength()

    cdef void _publish_strength(self) noexcept nogil:
        publish64(&self.pool.superblock.strength,
                  checked_word(self.pool.seed, KEY_STRENGTH, 0, self.pool.store.tried_strength))

    cdef uint32_t _encode(self, const uint8_t* block, uint8_t* target, uint32_t limit, uint32_t* kind) noexcept nogil:
        """The shorter of the encodings without and with the dictionary; its length, 0 when none is below `limit`."""
        cdef uint8_t with_dictionary[BLOCK]
        cdef uint32_t other
        cdef uint32_t length = zstd_compress(self.compressor, NULL, block, target, limit - 1)
        kind[0] = CODEC_ZSTD
        if self.cdict == NULL:
            return length
        other = zstd_compress(self.compressor, self.cdict, block, with_dictionary, (length or limit) - 1)
        if other:
            memcpy(target, with_dictionary, other)
            kind[0] = CODEC_ZSTD_DICT + self.dictionary
            return other
        return length

    # -- the dictionary ------------------------------------------------------------------------------------------

    cdef void _find_dictionary(self) noexcept nogil:
        """Use the dictionary that the pool's objects use, or train one. Without one the run goes on."""
        cdef int number
        cdef uint8_t* content
        lock_take_behind(&self.pool.lock)
        for number in range(CODEC_DICTS):
            if self.pool.superblock.dictionary[number] and self.pool.store.bytes_of[CODEC_ZSTD_DICT + number]:
                self.dictionary = number
        lock_leave(&self.pool.lock)
        if self.dictionary == NO_DICTIONARY and not self._train():
            return
        content = self.pool.arena.base + <uint64_t>dictionary_unit(self.pool.superblock, self.dictionary) * UNIT_SIZE
        self.cdict = zstd_new_cdict(content, dictionary_length(self.pool.superblock, self.dictionary), self.level)

    cdef bint _train(self) noexcept nogil:
        cdef size_t size = min(
            max(self._compressed() // DICTIONARY_SHARE, <uint64_t>SMALLEST_DICTIONARY), <uint64_t>LARGEST_DICTIONARY)
        cdef uint8_t* samples = <uint8_t*>malloc(SAMPLES * BLOCK)
        cdef uint8_t* content = <uint8_t*>malloc(size)
        cdef uint32_t count
        cdef size_t length = 0
        if samples != NULL and content != NULL:
            count = self._sample(samples)
            if count >= FEWEST_SAMPLES:
                length = zstd_train(content, size, samples, count)
        if length:
            self.dictionary = keep_dictionary(self.pool, content, <uint32_t>length)
        free(samples)
        free(content)
        return self.dictionary != NO_DICTIONARY

    cdef uint64_t _compressed(self) noexcept nogil:
        """Bytes of objects that a dictionary may save some of; what kits owe (kit.pyx) included, or they may be fewer
        than none."""
        cdef uint64_t found
        lock_take_behind(&self.pool.lock)
        gather_tallies(&self.pool.sides, self.pool.store)
        found = self.pool.store.bytes_of[CODEC_LZ4] + self.pool.store.bytes_of[CODEC_ZSTD]
        lock_leave(&self.pool.lock)
        return found

    cdef uint32_t _sample(self, uint8_t* samples) noexcept nogil:
        """Blocks of objects spread evenly over the handles; how many. None of a private export: whoever has the
        dictionary, as everybody does who receives a stream of the pool, reads what it is made of."""
        cdef uint8_t encoded[BLOCK]
        cdef uint32_t high = look32(&self.pool.store.cells.high)
        cdef uint32_t stride = max(<uint32_t>1, high // SAMPLES)
        cdef uint32_t handle = 1
        cdef uint32_t count = 0
        cdef uint64_t word, expected
        cdef bint whole
        while handle < high and count < SAMPLES:
            lock_take_behind(&self.pool.lock)
            word = self.pool.store.cells.cell(handle).word
            expected = self.pool.store.cells.cell(handle).fingerprint
            whole = _is_compressed(kind_of(word)) and self.pool.store.is_whole(handle)
            if whole:  # raw ones have nothing in common with anything
                memcpy(encoded, self.pool.store.bytes_at(word), length_of(word))
            lock_leave(&self.pool.lock)
            must(count < SAMPLES, b"there is room for one more sample")
            if whole and self.pool.store.decode_right(
                    kind_of(word), encoded, length_of(word), expected, samples + <uint64_t>count * BLOCK):
                count += self._is_common(samples + <uint64_t>count * BLOCK, expected)
            handle += stride
        return count

    cdef bint _is_common(self, const uint8_t* block, uint64_t expected) noexcept nogil:
        """Whether a block, which has the fingerprint expected, is of exports that are not private."""
        return fingerprint(block, self.pool.seed) & self.pool.fingerprint_mask ^ salt_of(COMMON_DOMAIN) == expected


cdef bint _is_compressed(uint32_t kind) noexcept nogil:
    """Whether it is an object's, and not raw."""
    return kind >= CODEC_LZ4 and kind < CODEC_ZSTD_DICT + CODEC_DICTS
