"""A disk: blocks of an export, read and written through its block table.

READ   no lock: reading.pyx
WRITE  up to RUN blocks: prepare (prepare.pyx); stripe; beside others, as far as it goes (beside.pyx); what is left with
       the lock alone: own the leaf; for each block store the object, swap the entry, release the old object; unlock
TRIM   leaf by leaf, HOLD_FREED entries under a stripe and the lock; nodes that name nothing any more are freed

Invariants
1. A write fails before it swaps the entry, or not at all: the old block survives every failure.
2. Whoever changes an entry holds its leaf's stripe, and a write of part of a block holds it from the moment it reads
   the block: two partial writes to one block never lose each other's bytes. Readers take no stripe.
3. Behind the end there is no content: the end is looked at under the lock in which an entry is swapped, so a write that
   was judged by an earlier size stores nothing there. Of an export that shrinks the end comes first, then what lies
   behind it is cleared (directory.pyx), and only then may the export grow again.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EBUSY, EDQUOT, EIO, ENOSPC
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from nbdzram.engine.beside cimport clear_beside, write_beside
from nbdzram.engine.blocks cimport ALL_BITS, SIZE_MAX, Blocks
from nbdzram.engine.cells cimport KIND_FILL
from nbdzram.engine.codec cimport BLOCK, is_zero
from nbdzram.engine.compact cimport make_room
from nbdzram.engine.cursor cimport Cursor, leaf_end
from nbdzram.engine.directory cimport SHRINKING_FROM, SIZE
from nbdzram.engine.extents cimport list_extents
from nbdzram.engine.foresight cimport Foreseen, foresee
from nbdzram.engine.kit cimport Kit, bring_slot, kit_of_thread, seat_of_thread
from nbdzram.engine.leaf cimport ANYWHERE, drop_shared_leaf, own_leaf
from nbdzram.engine.lock cimport (
    HOLD_FREED, HOLD_PAGES, WATCHED, Lock, lock_end, lock_init, lock_leave, lock_saw, lock_take,
)
from nbdzram.engine.must cimport must
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.prepare cimport RUN, Prepared, abandon, prepare, prepare_zeroes, put_down
from nbdzram.engine.publish cimport look64, publish64, tally
from nbdzram.engine.reading cimport read_block, read_range
from nbdzram.engine.table cimport (
    LEAF_BLOCKS, LEAF_SHIFT, aged, entry_handle, entry_word, hole_word, is_hole, same_entry,
)
from nbdzram.engine.sides cimport Seat
from nbdzram.engine.users cimport users_enter, users_leave, users_leaving, users_rise, users_sit

from nbdzram.engine.blocks import Extent
from nbdzram.errors import EngineError, PoolFull, UserError

__all__ = ["OFFLOAD_SIZE", "Disk", "Extent"]

OFFLOAD_SIZE = OFFLOAD

cdef enum:
    OFFLOAD = 65536

cdef uint64_t _offload = OFFLOAD


def _open_disk(PoolCore pool, uint32_t number, uint64_t stored, uint64_t same):
    """The disk of a live entry of the pool's export directory; for Pool alone."""
    disk = Disk.__new__(Disk)
    disk._bind(pool, number, stored, same)
    _test_stripes(disk)
    return disk


def _clear_behind(Disk disk):
    """What lies behind the end is none of the export; for Pool, as it opens."""
    if disk.clear_behind(SIZE_MAX):  # without memory: it is cleared before the export grows
        disk.pool.directory.publish(disk.number, SHRINKING_FROM, SIZE_MAX)


def _test_stripes(Disk disk):
    """Test the stripes as the pool's lock is tested; where it is watched, from now on."""
    cdef int index
    for index in range(STRIPES):
        if disk.pool.lock.tested & WATCHED:
            disk.stripes[index].longest_ns = 0
        disk.stripes[index].tested = disk.pool.lock.tested


def _longest_stripe(Disk disk):
    """Nanoseconds and function of the longest hold of a stripe."""
    cdef int index
    return max([(disk.stripes[index].longest_ns, disk.stripes[index].longest_in.decode()) for index in range(STRIPES)])


def offload_from(size: int, /) -> None:
    """Let requests over `size` bytes give the interpreter lock away. For tests: in small requests threads never
    meet."""
    global _offload
    _offload = size


@cython.final
@cython.no_gc_clear
cdef class Disk(Blocks):
    """See disk.pyi."""

    def __cinit__(self):
        cdef int index
        for index in range(STRIPES):
            lock_init(&self.stripes[index], 0)

    def __dealloc__(self):
        cdef int index
        for index in range(STRIPES):
            lock_end(&self.stripes[index])

    # -- the face for Python -------------------------------------------------------------------------------------

    def read(self, uint64_t offset, uint64_t length) -> bytes:
        self._valid(offset, length)
        target = PyBytes_FromStringAndSize(NULL, length)
        self._transfer(offset, length, <uint8_t*>PyBytes_AS_STRING(target), False)
        return target

    def read_into(self, uint64_t offset, target) -> None:
        self._transfer_buffer(offset, target, False)

    def write(self, uint64_t offset, source) -> None:
        self._transfer_buffer(offset, source, True)

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

    def clear(self) -> None:
        cdef int error
        with nogil:
            error = self._clear_all()
        self._raise(error, "clear", 0, self.size)

    def extents(self, uint64_t offset, uint64_t length, size_t limit, uint32_t mask=ALL_BITS) -> list:
        self._valid(offset, length)
        return list_extents(self, offset, length, limit, mask)

    def resize(self, uint64_t size_bytes) -> None:
        cdef int error
        if size_bytes > SIZE_MAX:
            raise UserError(f"export {self.name!r}: size {size_bytes} is over {SIZE_MAX} bytes")
        with nogil:
            error = self._resize(size_bytes)
        if error == EBUSY:
            raise UserError(f"export {self.name!r} is being resized already; wait for its end")
        if error == ENOSPC:
            raise PoolFull(
                f"cannot grow export {self.name!r} to {size_bytes} bytes: what it held behind {self.size} before it "
                "shrank is not all cleared, and there is no memory for that; raise the pool's limit, trim, fold or "
                "compact"
            )
        if error == EIO and not self.gone and not self.pool.closing and not self.is_sound():
            raise EngineError(f"cannot resize export {self.name!r}: {self.why_not()}")
        if error == EIO and self.size % BLOCK and not self.gone and not self.pool.closing:
            raise EngineError(
                f"cannot grow export {self.name!r} to {size_bytes} bytes: its last block held more before it shrank, "
                f"and is not what was written; write its {self.size % BLOCK} bytes at {self.size // BLOCK * BLOCK} "
                "anew first"
            )
        self._raise(error, "resize", 0, size_bytes)

    cdef int _transfer_buffer(self, uint64_t offset, object buffer, bint writing) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if writing else PyBUF_WRITABLE)
        try:
            self._valid(offset, view.len)
            self._transfer(offset, view.len, <uint8_t*>view.buf, writing)
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef int _transfer(self, uint64_t offset, uint64_t length, uint8_t* place, bint writing) except -1:
        """Read into `place` or write from it; without the interpreter lock where that takes long."""
        cdef int error
        if length > _offload:
            with nogil:
                error = self.c_write(offset, length, place) if writing else self.c_read(offset, length, place)
        else:
            error = self.c_write(offset, length, place) if writing else self.c_read(offset, length, place)
        self._raise(error, "write" if writing else "read", offset, length)
        return 0

    # -- requests, from any thread ---------------------------------------------------------------------------------

    cdef void c_foresee(self, const Foreseen* blocks, uint32_t count) noexcept nogil:
        """These blocks are about to be asked for."""
        foresee(self, blocks, count)

    cdef int c_read(self, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil:
        return read_range(self, offset, length, target)

    cdef int c_write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil:
        cdef int error
        cdef Seat* seat = seat_of_thread(&self.pool.sides)
        if not users_sit(&self.pool.users, seat):
            return EIO
        error = self._write(offset, length, source)
        users_rise(&self.pool.users, seat)
        return error

    cdef int c_trim(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Whole blocks only: the protocol lets a server keep the rest. It lets it keep all, so no room is no error."""
        cdef int error
        cdef Seat* seat = seat_of_thread(&self.pool.sides)
        if not users_sit(&self.pool.users, seat):
            return EIO
        error = self._clear((offset + BLOCK - 1) // BLOCK, (offset + length) // BLOCK)
        users_rise(&self.pool.users, seat)
        return 0 if error == ENOSPC else error

    cdef int c_zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil:
        cdef int error
        cdef Seat* seat = seat_of_thread(&self.pool.sides)
        if not users_sit(&self.pool.users, seat):
            return EIO
        error = self._refused(self._zero(offset, length, no_hole))
        users_rise(&self.pool.users, seat)
        return error

    # -- writing -------------------------------------------------------------------------------------------------

    cdef int _write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil:
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
                return self._refused(error)
            done += count
        return 0

    cdef int _refused(self, int error) noexcept nogil:
        """What a write ends with: count it if it found no room."""
        if error == ENOSPC:
            tally(&self.pool.failed_count)
        return error

    cdef Lock* _stripe(self, uint64_t block) noexcept nogil:
        return &self.stripes[(block >> LEAF_SHIFT) % STRIPES]

    cdef int _write_part(self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source) noexcept nogil:
        """Change a part of a block (to zeroes when source is NULL)."""
        cdef int error
        cdef bint waited = False
        must(start + count <= BLOCK, b"a part of a block lies inside it")
        while True:
            self.pool.keep_short()
            lock_take(self._stripe(block))
            error = self._store_part(block, start, count, source, block * BLOCK + start + count)
            lock_leave(self._stripe(block))
            if error != ENOSPC or not make_room(self.pool, &waited):
                return error

    cdef int _store_part(
        self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source, uint64_t end
    ) noexcept nogil:
        """Read the block, change a part, store it. Holds the stripe from the first to the last."""
        cdef uint8_t whole[BLOCK]
        cdef uint8_t encoded[BLOCK]
        cdef Prepared prepared
        cdef uint32_t stored
        cdef int error = read_block(self, block, whole)
        if error == EIO and _is_all_there_is(self, block, start, count):
            memset(whole, 0, BLOCK)  # what was there matters to nobody, and rot goes as from any block written whole
            error = 0
        if error:
            return error
        if end == ANYWHERE and is_zero(whole + start, count):
            return 0  # so a hole stays one, and no room is needed
        if source == NULL:
            memset(whole + start, 0, count)
        else:
            memcpy(whole + start, source, count)
        prepare(self.pool, self.salt, whole, 1, encoded, &prepared)
        return self._commit(block, 1, &prepared, end, &stored)

    cdef int _write_run(self, uint64_t first, uint32_t count, const uint8_t* source) noexcept nogil:
        """Replace up to RUN whole blocks of one leaf."""
        cdef Kit* kit = kit_of_thread(&self.pool.sides)
        cdef uint8_t encoded[RUN * BLOCK]
        cdef Prepared prepared[RUN]
        cdef uint32_t stored
        cdef int error
        cdef bint waited = False
        if kit != NULL:
            bring_slot(kit)
        while True:
            self.pool.keep_short()
            prepare(self.pool, self.salt, source, count, encoded, prepared)
            lock_take(self._stripe(first))
            error = self._commit(first, count, prepared, (first + count) * BLOCK, &stored)
            lock_leave(self._stripe(first))
            waited = waited and stored == 0
            if error != ENOSPC or not make_room(self.pool, &waited):
                return error
            # Not from the beginning: what is stored again takes the room that was made.
            first += stored
            count -= stored
            source += stored * BLOCK

    cdef int _commit(
        self, uint64_t first, uint32_t count, const Prepared* prepared, uint64_t end, uint32_t* stored
    ) noexcept nogil:
        """Give blocks of one leaf their new content, in order, up to the first that fails, unless what is written ends
        (in bytes of the export) behind its end; how many are `stored`. Holds the stripe."""
        cdef uint64_t* leaf = NULL
        cdef uint32_t index
        cdef int error = ENOSPC
        must(first % LEAF_BLOCKS + count <= LEAF_BLOCKS, b"what is committed at once lies in one leaf")
        stored[0] = write_beside(self.pool, self, first, count, prepared, end)
        if stored[0] == count:
            return 0
        lock_take(&self.pool.lock)
        if self.pool.may_retire():
            leaf = own_leaf(self, first, end, False, &error)
        while leaf != NULL and stored[0] < count and self._replace(leaf, first + stored[0], &prepared[stored[0]]):
            stored[0] += 1
        if stored[0] < count and error == 0:
            error = EDQUOT if self._is_beyond(leaf, first + stored[0]) else ENOSPC
            self.pool.tables.prune(self.root(), first)
        for index in range(stored[0], count):
            abandon(self.pool, &prepared[index])
        lock_leave(&self.pool.lock)
        return error

    cdef bint _is_beyond(self, const uint64_t* leaf, uint64_t block) noexcept nogil:
        """Under the pool's lock: whether the block would be one more than the export's quota."""
        cdef uint64_t quota = look64(&self.quota), old = look64(leaf + block % LEAF_BLOCKS)
        return quota != 0 and self.stored >= quota and (is_hole(old) or not self.pool.tables.is_right(old, block))

    cdef bint _replace(self, uint64_t* leaf, uint64_t block_number, const Prepared* block) noexcept nogil:
        """Store one prepared block under the pool's lock. False when there is no room; nothing changed then."""
        cdef uint32_t handle = block.handle
        cdef bint same = handle == 0 and block.kind == KIND_FILL
        cdef uint64_t entry = same_entry(self.pool.seed, block_number, block.word) if same else 0
        if self._is_beyond(leaf, block_number):
            return False
        if entry == 0:
            if same:
                handle = self.pool.store.put_fill(block.word)
            elif handle:
                put_down(self.pool, block)
                self.pool.inline_folded += 1
            else:
                handle = self.pool.store.put(block.source, block.length, block.kind, block.word)
            if handle == 0:
                return False
            entry = aged(entry_word(self.pool.seed, block_number, handle, block.word), self.pool.now)
        self._swap(leaf, block_number, entry, same)
        return True

    cdef void _swap(self, uint64_t* leaf, uint64_t block, uint64_t entry, bint same) noexcept nogil:
        """Under the pool's lock: give a block its new entry and release what the old one held. Cannot fail."""
        cdef uint64_t old = look64(leaf + block % LEAF_BLOCKS)  # readers make it younger
        cdef bint counted = not is_hole(old) and self.pool.tables.is_right(old, block)
        cdef bint was_same = counted and self.pool.tables.is_same(old)
        publish64(leaf + block % LEAF_BLOCKS, entry)
        self._count(block, <int64_t>(not is_hole(entry)) - counted, <int64_t>same - was_same)
        if counted and entry_handle(old):
            self.pool.store.release(entry_handle(old))

    # -- trimming and zeroing ------------------------------------------------------------------------------------

    cdef int _zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil:
        cdef uint64_t end = offset + length
        cdef uint64_t first = (offset + BLOCK - 1) // BLOCK
        cdef uint64_t last = end // BLOCK
        cdef Prepared zeroes[RUN]
        cdef uint32_t count, stored
        cdef int error = 0
        cdef bint waited = False
        if length == 0:
            return 0
        if first > last:  # inside one block
            return self._write_part(last, offset % BLOCK, <uint32_t>length, NULL)
        if offset % BLOCK:
            error = self._write_part(first - 1, offset % BLOCK, BLOCK - offset % BLOCK, NULL)
        if error == 0 and end % BLOCK:
            error = self._write_part(last, 0, end % BLOCK, NULL)
        if error or not no_hole:
            return error or self._clear(first, last)
        for count in range(RUN):
            prepare_zeroes(&zeroes[count])
        while first < last:
            count = <uint32_t>min(min(last - first, <uint64_t>RUN), LEAF_BLOCKS - first % LEAF_BLOCKS)
            self.pool.keep_short()
            lock_take(self._stripe(first))
            error = self._commit(first, count, zeroes, (first + count) * BLOCK, &stored)
            lock_leave(self._stripe(first))
            waited = waited and stored == 0
            if error and not (error == ENOSPC and make_room(self.pool, &waited)):
                return error
            first += stored
        return 0

    cdef int _clear_all(self) noexcept nogil:
        """To the end of the last leaf: one that a clone shares is dropped whole, and not copied for a part of it."""
        cdef int error
        cdef Seat* seat = seat_of_thread(&self.pool.sides)
        if not users_sit(&self.pool.users, seat):
            return EIO
        error = self._clear(0, (self.end_block() + LEAF_BLOCKS - 1) // LEAF_BLOCKS * LEAF_BLOCKS)
        users_rise(&self.pool.users, seat)
        return error

    cdef int _clear(self, uint64_t first, uint64_t end) noexcept nogil:
        """Blocks [first, end) become holes. ENOSPC: but for those in leaves that a clone shares, and no room to
        copy."""
        cdef Cursor cursor
        cdef bint found, gone
        cdef Seat* seat
        cdef int error
        cdef int refused = 0
        cursor.next, cursor.end = first, end
        while cursor.next < cursor.end:
            seat = self.pool.begin_look()
            found = self.walk(&cursor)
            gone = self.root() == NULL
            self.pool.end_look(seat)
            if gone or users_leaving(&self.pool.users):
                return EIO
            if not found:
                continue
            error = self._clear_leaf(cursor.next, leaf_end(&cursor))
            if error and error != ENOSPC:
                return error
            refused = error or refused
            cursor.next = leaf_end(&cursor)
        return refused

    cdef int _clear_leaf(self, uint64_t first, uint64_t end) noexcept nogil:
        """Clear blocks of one leaf, HOLD_FREED of them at a time, and free it when nothing is left in it."""
        cdef uint64_t block = first
        cdef uint64_t last, waited_at = end
        cdef int error = 0
        while block < end and error == 0:
            self.pool.keep_short()
            lock_take(self._stripe(first))
            last = min(end, block + HOLD_FREED)
            block += clear_beside(self.pool, self, block, <uint32_t>(last - block), last == end)
            if block < last:
                error = self._clear_alone(first, &block, end)
            lock_leave(self._stripe(first))
            if error == ENOSPC and waited_at != block:  # once a place, see make_room
                waited_at = block
                error = 0 if self.pool.reclaim() else ENOSPC
        return error

    cdef int _clear_alone(self, uint64_t first, uint64_t* block, uint64_t end) noexcept nogil:
        """Under the stripe: go on at block[0], which moves on, where clearing beside others does not."""
        cdef int error = ENOSPC
        lock_take(&self.pool.lock)
        if self.pool.may_retire():
            error = 0
            if block[0] == first and end - first == LEAF_BLOCKS and drop_shared_leaf(self, first):
                block[0] = end
            else:
                error = self._clear_some(block, end)
        lock_leave(&self.pool.lock)
        return error

    cdef int _clear_some(self, uint64_t* block, uint64_t end) noexcept nogil:
        """Under stripe and lock: clear up to HOLD_FREED blocks of a leaf from block[0] on, which moves behind them."""
        cdef uint64_t first = block[0], last = min(end, block[0] + HOLD_FREED), pages
        cdef uint64_t* root = self.root()
        cdef uint64_t* leaf = self.pool.tables.leaf(root, first) if root != NULL else NULL
        cdef int error = 0
        if root == NULL:
            return EIO
        if leaf == NULL:
            block[0] = end
            return 0
        while block[0] < last and look64(leaf + block[0] % LEAF_BLOCKS) == hole_word(self.pool.seed, block[0]):
            block[0] += 1  # a leaf that a clone shares is not copied for holes
        if block[0] < last:
            leaf = own_leaf(self, first, ANYWHERE, True, &error)
        if leaf == NULL:
            return error
        pages = self.pool.store.slab.pages_used
        while block[0] < last and pages < self.pool.store.slab.pages_used + HOLD_PAGES:
            if look64(leaf + block[0] % LEAF_BLOCKS) != hole_word(self.pool.seed, block[0]):
                self._swap(leaf, block[0], hole_word(self.pool.seed, block[0]), False)
            block[0] += 1
        lock_saw(&self.pool.lock, block[0] - first, 0)
        if block[0] == end:
            self.pool.tables.prune(root, first)
        return 0

    # -- the size ------------------------------------------------------------------------------------------------

    cdef int _resize(self, uint64_t size) noexcept nogil:
        cdef int error
        cdef bint shrinks
        if not users_enter(&self.pool.users):
            return EIO
        lock_take(&self.pool.lock)
        error = EIO if self.root() == NULL else EBUSY if self.resizing else 0
        shrinks = size < self.size
        self.resizing = self.resizing or error == 0
        lock_leave(&self.pool.lock)
        if error == 0:
            if not shrinks and self.head().shrinking_from:
                error = self.clear_behind(self.head().shrinking_from)
            if error == 0:
                error = self._take_size(size)
            if error == 0 and shrinks:
                # The size is what was asked for, whatever comes now: what cannot be cleared for want of memory, or as
                # the pool closes, is out of reach, and is cleared before the export grows, or on opening.
                self.clear_behind(self.head().shrinking_from)
            lock_take(&self.pool.lock)
            self.resizing = False
            lock_leave(&self.pool.lock)
        users_leave(&self.pool.users)
        return error

    cdef int _take_size(self, uint64_t size) noexcept nogil:
        """Give the export its new size; an old end that lies behind it is remembered before."""
        cdef int error = 0
        lock_take(&self.pool.lock)
        if self.sound_root() == NULL:
            error = EIO
        else:
            if size < self.size and self.head().shrinking_from < self.size:
                self.pool.directory.publish(self.number, SHRINKING_FROM, self.size)
            self.pool.directory.publish(self.number, SIZE, size)
            self.size = size
        lock_leave(&self.pool.lock)
        return error

    cdef int clear_behind(self, uint64_t reach) noexcept nogil:
        """Clear what earlier, larger sizes left from the end to `reach`; whole blocks first, as that makes room."""
        cdef uint64_t block = self.size // BLOCK
        cdef uint64_t behind = self.end_block()
        cdef int error = self._clear(behind, (reach + BLOCK - 1) // BLOCK)
        if error == 0 and block < behind:
            self._shrunk_to(behind * BLOCK)
            self.pool.reclaim()  # what was cleared is room
            lock_take(self._stripe(block))
            error = self._store_part(block, self.size % BLOCK, BLOCK - self.size % BLOCK, NULL, ANYWHERE)
            lock_leave(self._stripe(block))
        if error == 0:
            self._shrunk_to(0)
        return error

    cdef void _shrunk_to(self, uint64_t end) noexcept nogil:
        """Remember of an export that shrinks that nothing lies behind `end` any more; 0: nothing behind its size."""
        lock_take(&self.pool.lock)
        if self.sound_root() != NULL and self.head().shrinking_from > end:
            self.pool.directory.publish(self.number, SHRINKING_FROM, end)
        lock_leave(&self.pool.lock)


cdef bint _is_all_there_is(Disk disk, uint64_t block, uint32_t start, uint32_t count) noexcept nogil:
    """Whether a part is all that the export has of a block: its last one, where the size is no multiple of it.

    It stays right while the stripe is held: an export that grows has zeroes behind its end.
    """
    cdef uint64_t size
    lock_take(&disk.pool.lock)
    size = disk.size
    lock_leave(&disk.pool.lock)
    return start == 0 and block * BLOCK + count >= size
