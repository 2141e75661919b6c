"""A disk: blocks of an export, read and written through its block table.

READ   lock; entry -> object; copy its encoded bytes; unlock; decode behind the reply header
WRITE  up to RUN blocks: same-filled? fingerprint, compress (Prepared); stripe; lock; own the leaf; for each block store
       the object, swap the entry, release the old object; unlock

Invariants
1. A write fails before it swaps the entry, or not at all: the old block survives every failure.
2. Whoever changes an entry holds its leaf's stripe, and a write of part of a block holds it from the moment it reads
   the block: two partial writes to one block never lose each other's bytes. Readers take no stripe.
3. stored and same count the entries that are not holes, and the same-filled among them.

Known limits: a read copies the encoded bytes (at most 4 KiB, about 0.1 us) so that no decoding happens under the lock.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_WRITABLE, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from enum import IntFlag

from nbdzram.engine.cells cimport KIND_FILL, REFS_SHIFT, kind_of, length_of, publish32, publish64
from nbdzram.engine.codec cimport BLOCK, CODEC_LZ4, CODEC_RAW, fill, fingerprint, lz4_compress, same_filled
from nbdzram.engine.pool cimport (
    ENTRY_DELETING, ENTRY_LIVE, READ_ONLY_FLAG, ExportEntry, Pool, lock_leave, lock_take, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)
from nbdzram.engine.store cimport HUGE_LENGTH
from nbdzram.engine.table cimport LEAF_BLOCKS, LEAF_SHIFT, MAX_BLOCKS_SHIFT, entry_handle

from nbdzram.engine.stats import DiskStats, DiskUsage
from nbdzram.errors import EngineError, PoolFull, UserError

OFFLOAD_SIZE = OFFLOAD
cdef uint64_t SIZE_MAX = <uint64_t>BLOCK << MAX_BLOCKS_SHIFT

cdef enum:
    OFFLOAD = 65536
    # LZ4 stops early when a block will not fit; its estimate near the end is pessimistic by a few bytes.
    LZ4_ROOM = HUGE_LENGTH + 64
    BATCH = 64  # entries changed under one hold of the lock: about 10 us
    RUN = 8  # blocks stored under one hold of the lock: about 4 us

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


def _open_disk(Pool pool, uint32_t number, uint64_t stored, uint64_t same):
    """The disk of a live entry of the pool's export directory; for Pool alone."""
    disk = Disk.__new__(Disk)
    disk._bind(pool, number, stored, same)
    return disk


@cython.final
cdef class Disk:
    """See disk.pyi."""

    def __cinit__(self):
        cdef int index
        for index in range(STRIPES):
            pthread_mutex_init(&self.stripes[index], NULL)

    def __dealloc__(self):
        cdef int index
        for index in range(STRIPES):
            pthread_mutex_destroy(&self.stripes[index])

    def _bind(self, Pool pool, uint32_t number, uint64_t stored, uint64_t same):
        self.pool = pool
        self.number = number
        self.entry = pool.export_entry(number)
        self.name = self.entry.name[:self.entry.name_length].decode()
        self.size = self.entry.size
        self.stored = stored
        self.same = same

    def _share_with(self, Disk twin):
        """Make a disk that is no export yet a clone of this one; for Pool."""
        lock_take(&self.pool.lock)
        twin.entry.root = self.entry.root
        self.pool.tables.acquire(twin.entry.root)
        twin.stored = self.stored
        twin.same = self.same
        self.pool.blocks_stored += self.stored
        self.pool.blocks_same += self.same
        publish32(&twin.entry.state, ENTRY_LIVE)
        lock_leave(&self.pool.lock)

    def _retire(self, bint deleting):
        """Every later request fails: the export is being deleted, or the pool was closed."""
        lock_take(&self.pool.lock)
        if deleting:
            publish32(&self.entry.state, ENTRY_DELETING)
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

    # -- the face for Python -------------------------------------------------------------------------------------

    def read(self, uint64_t offset, uint64_t length) -> bytes:
        self._valid(offset, length)
        target = PyBytes_FromStringAndSize(NULL, length)
        cdef uint8_t* place = <uint8_t*>PyBytes_AS_STRING(target)
        cdef int error
        if length > OFFLOAD:
            with nogil:
                error = self.c_read(offset, length, place)
        else:
            error = self.c_read(offset, length, place)
        self._raise(error, "read", offset, length)
        return target

    def read_into(self, uint64_t offset, target) -> None:
        cdef Py_buffer view
        cdef int error
        PyObject_GetBuffer(target, &view, PyBUF_WRITABLE)
        try:
            self._valid(offset, view.len)
            if view.len > OFFLOAD:
                with nogil:
                    error = self.c_read(offset, view.len, <uint8_t*>view.buf)
            else:
                error = self.c_read(offset, view.len, <uint8_t*>view.buf)
            self._raise(error, "read", offset, view.len)
        finally:
            PyBuffer_Release(&view)

    def write(self, uint64_t offset, source) -> None:
        cdef Py_buffer view
        cdef int error
        PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
        try:
            self._valid(offset, view.len)
            if view.len > OFFLOAD:
                with nogil:
                    error = self.c_write(offset, view.len, <const uint8_t*>view.buf)
            else:
                error = self.c_write(offset, view.len, <const uint8_t*>view.buf)
            self._raise(error, "write", offset, view.len)
        finally:
            PyBuffer_Release(&view)

    def trim(self, uint64_t offset, uint64_t length) -> None:
        cdef int error
        self._valid(offset, length)
        with nogil:
            error = self.c_trim(offset, length)
        self._raise(error, "trim", offset, length)

    def zero(self, uint64_t offset, uint64_t length, *, bint no_hole=False) -> None:
        cdef int error
        self._valid(offset, length)
        with nogil:
            error = self.c_zero(offset, length, no_hole)
        self._raise(error, "zero", offset, length)

    def _valid(self, uint64_t offset, uint64_t length):
        if offset > self.size or length > self.size - offset:
            raise ValueError(f"{length} bytes at {offset} reach past the end of export {self.name!r}, {self.size}")

    def _raise(self, int error, str verb, offset, length):
        if error == 0:
            return
        if error == ENOSPC:
            raise PoolFull(
                f"cannot {verb} {length} bytes at {offset} of export {self.name!r}: the pool is at its limit of "
                f"{self.pool.mem_limit} bytes, or memory is exhausted; raise the limit, trim, fold or compact"
            )
        raise EngineError(f"cannot {verb} {length} bytes at {offset} of export {self.name!r}: "
                          + ("it was deleted" if self.retired else "a stored object does not decode"))

    # -- reading -------------------------------------------------------------------------------------------------

    cdef int c_read(self, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint32_t start, count
        cdef int error
        while done < length:
            start = (offset + done) % BLOCK
            count = <uint32_t>min(<uint64_t>BLOCK - start, length - done)
            error = self._read_block((offset + done) // BLOCK, start, count, target + done)
            if error:
                return error
            done += count
        return 0

    cdef int _read_block(self, uint64_t block, uint32_t start, uint32_t count, uint8_t* target) noexcept nogil:
        """`count` bytes of a block from its byte `start`."""
        cdef uint8_t encoded[BLOCK]
        cdef uint8_t whole[BLOCK]
        cdef uint64_t* leaf
        cdef uint64_t entry = 0
        cdef uint64_t word
        cdef uint32_t handle
        lock_take(&self.pool.lock)
        leaf = self.pool.tables.leaf(self.entry.root, block)
        if leaf != NULL:
            entry = leaf[block % LEAF_BLOCKS]
        handle = entry_handle(entry)
        if handle == 0:
            lock_leave(&self.pool.lock)
            # A hole is 0, so is its word; a signed shift brings a same-filled word back.
            fill(target, count, <uint64_t>(<int64_t>entry >> 1), start % 8)
            return EIO if self.retired else 0
        if <uint32_t>entry >> 1 != self.pool.now:
            leaf[block % LEAF_BLOCKS] = <uint64_t>handle << 32 | <uint64_t>self.pool.now << 1
        handle = self.pool.store.resolve(handle)
        word = self.pool.store.cells.cell(handle).word
        if kind_of(word) == KIND_FILL:
            word = self.pool.store.cells.cell(handle).fingerprint
            lock_leave(&self.pool.lock)
            fill(target, count, word, start % 8)
            return 0
        if kind_of(word) == CODEC_RAW:
            memcpy(target, self.pool.store.bytes_at(word) + start, count)
            lock_leave(&self.pool.lock)
            return 0
        memcpy(encoded, self.pool.store.bytes_at(word), length_of(word))
        lock_leave(&self.pool.lock)
        if count == BLOCK:
            return 0 if self.pool.store.decode(kind_of(word), encoded, length_of(word), target) else EIO
        if not self.pool.store.decode(kind_of(word), encoded, length_of(word), whole):
            return EIO
        memcpy(target, whole + start, count)
        return 0

    # -- writing -------------------------------------------------------------------------------------------------

    cdef int c_write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil:
        cdef uint64_t done = 0
        cdef uint64_t block
        cdef uint32_t start, count
        cdef int error
        while done < length:
            block = (offset + done) // BLOCK
            start = (offset + done) % BLOCK
            if start == 0 and length - done >= BLOCK:
                # Runs end where leaves do: one stripe covers a run.
                count = <uint32_t>min(min((length - done) // BLOCK, <uint64_t>RUN), LEAF_BLOCKS - block % LEAF_BLOCKS)
                error = self._write_run(block, count, source + done)
                count *= BLOCK
            else:
                count = <uint32_t>min(<uint64_t>BLOCK - start, length - done)
                error = self._write_part(block, start, count, source + done)
            if error:
                return error
            done += count
        return 0

    cdef pthread_mutex_t* _stripe(self, uint64_t block) noexcept nogil:
        return &self.stripes[(block >> LEAF_SHIFT) % STRIPES]

    cdef int _write_part(self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source) noexcept nogil:
        """Read the block, change a part (to zeroes when source is NULL), store it."""
        cdef uint8_t whole[BLOCK]
        cdef uint8_t encoded[LZ4_ROOM]
        cdef Prepared prepared
        cdef int error
        pthread_mutex_lock(self._stripe(block))
        error = self._read_block(block, 0, BLOCK, whole)
        if error == 0:
            if source == NULL:
                memset(whole + start, 0, count)
            else:
                memcpy(whole + start, source, count)
            self._prepare(whole, encoded, &prepared)
            error = self._commit(block, 1, &prepared)
        pthread_mutex_unlock(self._stripe(block))
        return error

    cdef int _write_run(self, uint64_t first, uint32_t count, const uint8_t* source) noexcept nogil:
        """Replace up to RUN whole blocks of one leaf."""
        cdef uint8_t encoded[RUN][LZ4_ROOM]
        cdef Prepared prepared[RUN]
        cdef uint32_t index
        cdef int error
        for index in range(count):
            self._prepare(source + index * BLOCK, encoded[index], &prepared[index])
        pthread_mutex_lock(self._stripe(first))
        error = self._commit(first, count, prepared)
        pthread_mutex_unlock(self._stripe(first))
        return error

    cdef void _prepare(self, const uint8_t* source, uint8_t* encoded, Prepared* block) noexcept nogil:
        """All that can be done for one block without the lock."""
        cdef uint64_t word
        block.handle = 0
        if same_filled(source, &word):
            block.kind = KIND_FILL
            block.word = word
            return
        word = fingerprint(source, self.pool.seed) & self.pool.fingerprint_mask
        block.word = word
        if self.pool.inline_on:
            block.handle = self.pool.find_equal(word, source, &block.shift)
            if block.handle:
                return
        self.pool.store.index.prefetch_bucket(word)
        block.kind = CODEC_LZ4
        block.source = encoded
        block.length = lz4_compress(source, encoded, LZ4_ROOM)
        self.pool.store.index.prefetch_chain(word)
        if block.length == 0 or block.length >= HUGE_LENGTH:
            block.kind = CODEC_RAW
            block.source = source
            block.length = BLOCK

    cdef int _commit(self, uint64_t first, uint32_t count, const Prepared* prepared) noexcept nogil:
        """Give blocks of one leaf their new content, in order, up to the first that fails. Holds the stripe."""
        cdef uint64_t* leaf
        cdef uint32_t index = 0
        cdef int error = 0
        lock_take(&self.pool.lock)
        leaf = NULL if self.retired else self.pool.tables.leaf_for_write(&self.entry.root, first)
        while leaf != NULL and index < count and self._replace(leaf, first + index, &prepared[index]):
            index += 1
        if index < count:
            error = self._fail()
        while index < count:
            if prepared[index].handle:
                self.pool.put_down(prepared[index].handle, prepared[index].shift)
                self.pool.store.release(prepared[index].handle)
            index += 1
        lock_leave(&self.pool.lock)
        return error

    cdef bint _replace(self, uint64_t* leaf, uint64_t block_number, const Prepared* block) noexcept nogil:
        """Store one prepared block under the pool's lock. False when there is no room; nothing changed then."""
        cdef uint64_t entry = block.word << 1 | 1
        cdef uint32_t handle = block.handle
        cdef bint same = handle == 0 and block.kind == KIND_FILL
        if not same or <uint64_t>(<int64_t>entry >> 1) != block.word:
            if same:
                handle = self.pool.store.put_fill(block.word)
            elif handle:
                self.pool.put_down(handle, block.shift)
                self.pool.inline_folded += 1
            else:
                handle = self.pool.store.put(block.source, block.length, block.kind, block.word)
            if handle == 0:
                return False
            entry = <uint64_t>handle << 32 | <uint64_t>self.pool.now << 1
        self._swap(leaf, block_number, entry, same)
        return True

    cdef int _fail(self) noexcept nogil:
        """Under the pool's lock: count a refused write and say why."""
        if self.retired:
            return EIO
        self.pool.failed_writes += 1
        return ENOSPC

    cdef void _swap(self, uint64_t* leaf, uint64_t block, uint64_t entry, bint same) noexcept nogil:
        """Under the pool's lock: give a block its new entry and release what the old one held. Cannot fail."""
        cdef uint64_t old = leaf[block % LEAF_BLOCKS]
        cdef bint was_same = self.pool.tables.is_same(old)
        publish64(leaf + block % LEAF_BLOCKS, entry)
        self._count(block, (entry != 0) - (old != 0), same - was_same)
        if entry_handle(old):
            self.pool.store.release(entry_handle(old))

    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil:
        """A block came to be stored (1), or is no more (-1), and same-filled."""
        self.stored += stored
        self.same += same
        self.pool.blocks_stored += stored
        self.pool.blocks_same += same
        if block < self.recounted:
            self.found_stored += stored
            self.found_same += same

    # -- trimming and zeroing ------------------------------------------------------------------------------------

    cdef int c_trim(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Whole blocks only: the protocol lets a server keep the rest."""
        return self._clear((offset + BLOCK - 1) // BLOCK, (offset + length) // BLOCK)

    cdef int c_zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil:
        cdef uint64_t end = offset + length
        cdef uint64_t first = (offset + BLOCK - 1) // BLOCK
        cdef uint64_t last = end // BLOCK
        cdef Prepared zeroes[RUN]
        cdef uint32_t count
        cdef int error = 0
        if length == 0:
            return 0
        if first > last:  # inside one block
            return self._write_part(last, offset % BLOCK, <uint32_t>length, NULL)
        if offset % BLOCK:
            error = self._write_part(first - 1, offset % BLOCK, BLOCK - offset % BLOCK, NULL)
        if error == 0 and end % BLOCK:
            error = self._write_part(last, 0, end % BLOCK, NULL)
        if error:
            return error
        if not no_hole:
            return self._clear(first, last)
        for count in range(RUN):
            zeroes[count].kind = KIND_FILL
            zeroes[count].handle = 0
            zeroes[count].word = 0
        while first < last:
            count = <uint32_t>min(min(last - first, <uint64_t>RUN), LEAF_BLOCKS - first % LEAF_BLOCKS)
            pthread_mutex_lock(self._stripe(first))
            error = self._commit(first, count, zeroes)
            pthread_mutex_unlock(self._stripe(first))
            if error:
                return error
            first += count
        return 0

    cdef int _clear(self, uint64_t first, uint64_t end) noexcept nogil:
        """Blocks [first, end) become holes."""
        cdef uint64_t block = first
        cdef uint64_t leaf_end
        cdef int error
        while block < end:
            lock_take(&self.pool.lock)
            block = end if self.retired else self.pool.tables.next_leaf(self.entry.root, block, end)
            lock_leave(&self.pool.lock)
            if block >= end:
                break
            leaf_end = min(end, (block | (LEAF_BLOCKS - 1)) + 1)
            pthread_mutex_lock(self._stripe(block))
            error = self._clear_leaf(block, leaf_end)
            pthread_mutex_unlock(self._stripe(block))
            if error:
                return error
            block = leaf_end
        return 0

    cdef int _clear_leaf(self, uint64_t first, uint64_t end) noexcept nogil:
        """Clear blocks of one leaf, and free it when nothing is left in it. Holds the stripe."""
        cdef uint64_t block = first
        cdef uint64_t* leaf
        cdef uint32_t* place
        cdef int index
        cdef int error = 0
        lock_take(&self.pool.lock)
        if end - first == LEAF_BLOCKS and self.pool.tables.leaf_is_shared(self.entry.root, first):
            place = self.pool.tables.place_of(&self.entry.root, first)
            if place != NULL:
                self._drop_shared_leaf(first, place)
                block = end
        while block < end and error == 0:
            leaf = NULL
            if not self.retired and self.pool.tables.leaf(self.entry.root, block) != NULL:
                leaf = self.pool.tables.leaf_for_write(&self.entry.root, block)
                if leaf == NULL:
                    error = self._fail()
            if leaf == NULL:
                break
            for index in range(BATCH):
                if block < end:
                    self._swap(leaf, block, 0, False)
                    block += 1
            lock_leave(&self.pool.lock)
            lock_take(&self.pool.lock)
        leaf = self.pool.tables.leaf(self.entry.root, first)
        if leaf != NULL and not self.retired:
            for index in range(LEAF_BLOCKS):
                if leaf[index]:
                    break
            else:
                place = self.pool.tables.place_of(&self.entry.root, first)
                if place != NULL and not self.pool.tables.drop_share(place):
                    self.pool.tables.give_node(place)
        lock_leave(&self.pool.lock)
        return error

    cdef void _drop_shared_leaf(self, uint64_t first, uint32_t* place) noexcept nogil:
        """Forget a leaf that a clone shares: its objects stay as they are."""
        cdef uint32_t page = place[0]
        cdef uint64_t entry
        cdef int index
        if page and self.pool.tables.drop_share(place):
            for index in range(LEAF_BLOCKS):
                entry = self.pool.tables.entries(page)[index]
                self._count(first + index, -<int64_t>(entry != 0), -<int64_t>self.pool.tables.is_same(entry))

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

    def stats(self):
        cdef uint64_t stored, same
        lock_take(&self.pool.lock)
        stored = self.stored
        same = self.same
        lock_leave(&self.pool.lock)
        return DiskStats(size=self.size, stored=stored * BLOCK, same_filled=same * BLOCK)

    def usage(self):
        cdef Pool pool = self.pool
        cdef uint64_t block = 0
        cdef uint64_t end = (self.size + BLOCK - 1) // BLOCK
        cdef uint64_t stored = 0, same = 0, compressed = 0, shared = 0, huge = 0
        cdef uint64_t* leaf
        cdef uint64_t entry, word
        cdef uint32_t bits
        cdef bint leaf_shared
        cdef int index
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
                        word = pool.store.cells.cell(pool.store.resolve(entry_handle(entry))).word
                        compressed += length_of(word)
                        if bits & SHARED_BIT:
                            shared += length_of(word)
                        if bits & HUGE_BIT:
                            huge += 1
                    block = (block | (LEAF_BLOCKS - 1)) + 1
                lock_leave(&pool.lock)
        return DiskUsage(
            stored=stored * BLOCK, same_filled=same * BLOCK, compressed=compressed, unique=compressed - shared,
            shared=shared, huge=huge * BLOCK,
        )

    def resize(self, uint64_t size_bytes) -> None:
        cdef int error = 0
        cdef uint64_t old = self.size
        if size_bytes > SIZE_MAX:
            raise UserError(f"export {self.name!r}: size {size_bytes} is over {SIZE_MAX} bytes")
        self.size = size_bytes
        publish64(&self.entry.size, size_bytes)
        if size_bytes < old:
            with nogil:
                error = self.c_zero(size_bytes, (old + BLOCK - 1) // BLOCK * BLOCK - size_bytes, False)
        self._raise(error, "free", size_bytes, old - size_bytes)
