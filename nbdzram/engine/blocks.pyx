"""The blocks of an export: which are stored, of which kind, and who else holds them; never what they contain.

    export directory entry (pool.pyx) ── root ──> block table (table.pyx)
       name, size, flags, state                     entries

Disk (disk.pyx) reads and writes them, and calls _count for each entry that it changes.

Invariants
1. stored and same count the entries that are not holes, and the same-filled among them.
2. A retired export has no blocks any more, for whoever still asks.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from enum import IntFlag

from nbdzram.engine.cells cimport KIND_FILL, REFS_SHIFT, kind_of, length_of
from nbdzram.engine.codec cimport BLOCK, CODEC_RAW
from nbdzram.engine.directory cimport ENTRY_DELETING, ENTRY_LIVE, READ_ONLY_FLAG, STATE, entry_publish
from nbdzram.engine.lock cimport lock_leave, lock_take
from nbdzram.engine.pool cimport Pool
from nbdzram.engine.table cimport LEAF_BLOCKS, MAX_BLOCKS_SHIFT, entry_handle

from nbdzram.engine.stats import DiskStats, DiskUsage

cdef enum:
    HOLE_BIT = 1
    ZERO_BIT = 2
    SHARED_BIT = 4
    HUGE_BIT = 8
    SAME_FILLED_BIT = 16
    ALL_BITS = 31


class Extent(IntFlag):
    """What a run of blocks is. HOLE and ZERO are the bits of NBD's base:allocation; the others are ours."""

    HOLE = HOLE_BIT
    ZERO = ZERO_BIT
    SHARED = SHARED_BIT
    HUGE = HUGE_BIT
    SAME_FILLED = SAME_FILLED_BIT


cdef class Blocks:
    """What a disk is beside its content; see disk.pyi."""

    def _bind(self, Pool pool, uint32_t number, uint64_t stored, uint64_t same):
        self.pool = pool
        self.number = number
        self.entry = pool.export_entry(number)
        self.name = self.entry.name[:self.entry.name_length].decode()
        self.size = self.entry.size
        self.stored = stored
        self.same = same

    def _share_with(self, Blocks twin):
        """Make a disk that is no export yet a clone of this one; for Pool."""
        lock_take(&self.pool.lock)
        twin.entry.root = self.entry.root
        self.pool.tables.acquire(twin.entry.root)
        twin.stored = self.stored
        twin.same = self.same
        self.pool.blocks_stored += self.stored
        self.pool.blocks_same += self.same
        entry_publish(twin.entry, STATE, ENTRY_LIVE)
        lock_leave(&self.pool.lock)

    def _retire(self, bint deleting):
        """Every later request fails: the export is being deleted, or the pool was closed."""
        lock_take(&self.pool.lock)
        if deleting:
            entry_publish(self.entry, STATE, ENTRY_DELETING)
            self.pool.blocks_stored -= self.stored
            self.pool.blocks_same -= self.same
            self.stored = self.same = 0
        self.retired = True
        lock_leave(&self.pool.lock)

    @property
    def size_bytes(self):
        return self.size

    @property
    def read_only(self):
        return bool(self.entry.flags & READ_ONLY_FLAG) if not self.retired else True

    def _valid(self, uint64_t offset, uint64_t length):
        if offset > self.size or length > self.size - offset:
            raise ValueError(f"{length} bytes at {offset} reach past the end of export {self.name!r}, {self.size}")

    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil:
        """A block came to be stored (1), or is no more (-1), and same-filled."""
        self.stored += stored
        self.same += same
        self.pool.blocks_stored += stored
        self.pool.blocks_same += same
        if block < self.recounted:
            self.found_stored += stored
            self.found_same += same

    def stats(self):
        cdef uint64_t stored, same
        lock_take(&self.pool.lock)
        stored = self.stored
        same = self.same
        lock_leave(&self.pool.lock)
        return DiskStats(size=self.size, stored=stored * BLOCK, same_filled=same * BLOCK)

    # -- for a check -----------------------------------------------------------------------------------------------

    def recount(self):
        """Begin to count the blocks once more; changes to those that are counted are counted too (_count)."""
        lock_take(&self.pool.lock)
        self.recounted = self.found_stored = self.found_same = 0
        lock_leave(&self.pool.lock)

    cdef uint32_t count_on(self, uint32_t limit) noexcept nogil:
        """Under the pool's lock: look at up to `limit` entries more of one leaf; how many, 0 at the end of the table."""
        cdef uint64_t end = <uint64_t>1 << MAX_BLOCKS_SHIFT  # not the size: a disk that shrinks clears blocks behind it
        cdef uint64_t* leaf
        cdef uint32_t looked = 0
        self.recounted = end if self.retired else self.pool.tables.next_leaf(self.entry.root, self.recounted, end)
        if self.recounted == end:
            return 0
        leaf = self.pool.tables.leaf(self.entry.root, self.recounted)
        while looked < limit and (looked == 0 or self.recounted % LEAF_BLOCKS):
            self.found_stored += leaf[self.recounted % LEAF_BLOCKS] != 0
            self.found_same += self.pool.tables.is_same(leaf[self.recounted % LEAF_BLOCKS])
            self.recounted += 1
            looked += 1
        return looked

    # -- what the blocks are -------------------------------------------------------------------------------------

    cdef uint32_t _kind_bits(self, uint64_t entry, bint leaf_shared) noexcept nogil:
        cdef uint32_t handle = entry_handle(entry)
        cdef uint64_t word
        if entry == 0:
            return HOLE_BIT | ZERO_BIT
        if handle == 0:
            return SAME_FILLED_BIT | (ZERO_BIT if entry == 1 else 0)
        word = self.pool.store.cells.cell(self.pool.store.resolve(handle)).word
        if kind_of(word) == KIND_FILL:
            return SAME_FILLED_BIT
        return ((SHARED_BIT if leaf_shared or word >> REFS_SHIFT > 1 else 0)
                | (HUGE_BIT if kind_of(word) == CODEC_RAW else 0))

    def extents(self, uint64_t offset, uint64_t length, size_t limit, uint32_t mask=ALL_BITS):
        cdef Pool pool = self.pool
        cdef uint64_t at = offset
        cdef uint64_t end = offset + length
        cdef uint64_t run, block
        cdef uint64_t* leaf
        cdef uint32_t bits
        cdef uint64_t* runs = NULL
        cdef uint64_t* grown
        cdef size_t count = 0, room = 0
        cdef bint shared
        self._valid(offset, length)
        if limit == 0 or length == 0:
            return []
        with nogil:
            while at < end:
                lock_take(&pool.lock)
                block = at // BLOCK
                leaf = NULL if self.retired else pool.tables.leaf(self.entry.root, block)
                shared = leaf != NULL and pool.tables.leaf_is_shared(self.entry.root, block)
                while at < end:
                    block = at // BLOCK
                    if leaf == NULL:
                        run = pool.tables.next_leaf(self.entry.root, block, (end + BLOCK - 1) // BLOCK) * BLOCK
                        bits = (HOLE_BIT | ZERO_BIT) & mask
                    else:
                        run = (block + 1) * BLOCK
                        bits = self._kind_bits(leaf[block % LEAF_BLOCKS], shared) & mask
                    run = min(run, end)
                    if count and runs[2 * count - 1] == bits:
                        runs[2 * count - 2] += run - at
                    else:
                        if count == limit:
                            end = at  # the list is full: it ends where this run begins
                            break
                        if count == room:
                            room = min(limit, max(room * 2, <size_t>64))
                            grown = <uint64_t*>realloc(runs, room * 16)
                            if grown == NULL:
                                end = at
                                break
                            runs = grown
                        runs[2 * count] = run - at
                        runs[2 * count + 1] = bits
                        count += 1
                    at = run
                    if leaf == NULL or (at // BLOCK) % LEAF_BLOCKS == 0:
                        break
                lock_leave(&pool.lock)
        try:
            return [(runs[2 * index], runs[2 * index + 1]) for index in range(count)]
        finally:
            free(runs)

    def usage(self):
        cdef Pool pool = self.pool
        cdef uint64_t block = 0
        cdef uint64_t end = (self.size + BLOCK - 1) // BLOCK
        cdef uint64_t stored = 0, same = 0, compressed = 0, unique = 0, huge = 0
        cdef uint64_t* leaf
        cdef uint64_t entry
        cdef uint32_t handle, length, bits
        cdef bint leaf_shared
        cdef int index
        # Of each object with several holders, how many of them are blocks of this export. Only what is counted is resident.
        cdef uint32_t known = pool.store.cells.high
        cdef uint32_t* found = <uint32_t*>calloc(known, sizeof(uint32_t))
        if found == NULL:
            raise MemoryError("no memory to count who holds an export's objects")
        with nogil:
            while block < end:
                lock_take(&pool.lock)
                block = end if self.retired else pool.tables.next_leaf(self.entry.root, block, end)
                if block < end:
                    leaf = pool.tables.leaf(self.entry.root, block)
                    leaf_shared = pool.tables.leaf_is_shared(self.entry.root, block)
                    for index in range(LEAF_BLOCKS):
                        entry = leaf[index]
                        if entry == 0:
                            continue
                        stored += 1
                        bits = self._kind_bits(entry, leaf_shared)
                        if bits & SAME_FILLED_BIT:
                            same += 1
                            continue
                        handle = pool.store.resolve(entry_handle(entry))
                        length = length_of(pool.store.cells.cell(handle).word)
                        compressed += length
                        if bits & HUGE_BIT:
                            huge += 1
                        if not bits & SHARED_BIT:
                            unique += length
                        elif not leaf_shared and handle < known:
                            found[handle] += 1
                            if found[handle] == pool.store.cells.refs(handle):
                                unique += length
                    block = (block | (LEAF_BLOCKS - 1)) + 1
                lock_leave(&pool.lock)
        free(found)
        return DiskUsage(
            stored=stored * BLOCK, same_filled=same * BLOCK, compressed=compressed, unique=unique,
            shared=compressed - unique, huge=huge * BLOCK,
        )
