"""The blocks of an export: which are stored, of which kind, and who else holds them; never what they contain.

    export directory entry (directory.pyx) ── root ──> block table (table.pyx)
       name, size, flags, state                          entries

Disk (disk.pyx) reads and writes them, and calls _count for each entry that it changes.

Invariants
1. stored and same count the entries that are right and no holes, and the same-filled among them.
2. An export's block table is reached through root() alone, under the pool's lock, and again after each time that the
   lock was let go. Of a disk that is gone (deleted, or its pool closed) it gives nothing, for whoever still asks.
3. A directory entry is not used again while somebody holds its disk (Pool.held).
4. While a disk has a quota, no write makes `stored` go beyond it. What is stored already may be more: of a clone, or
   after the quota was lowered. Then blocks are replaced and given back, and none is added.
"""

from libc.errno cimport EDQUOT, EINVAL, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from enum import IntFlag

from nbdzram.engine.cells cimport KIND_FILL, REFS_SHIFT, kind_of, length_of
from nbdzram.engine.codec cimport BLOCK, CODEC_RAW
from nbdzram.engine.cursor cimport Cursor, go_on, next_entry
from nbdzram.engine.directory cimport CONCEALED, STATE, Head
from nbdzram.engine.domain cimport domain_of, salt_of
from nbdzram.engine.format cimport CONCEALED_FILLING, ENTRY_DELETING, ENTRY_LIVE, READ_ONLY_FLAG
from nbdzram.engine.lock cimport lock_leave, lock_take, lock_take_behind
from nbdzram.engine.must cimport must
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.publish cimport amend32, amend64, look32, look64
from nbdzram.engine.table cimport MAX_BLOCKS_SHIFT, entry_handle, is_hole, repeated_of
from nbdzram.engine.users cimport users_enter, users_leave, users_leaving

from nbdzram.engine.stats import DiskStats, DiskUsage
from nbdzram.errors import EngineError, PoolFull, full_because

cdef uint64_t NONE_WRONG = <uint64_t>-1
SIZE_MAX = <uint64_t>BLOCK << MAX_BLOCKS_SHIFT


class Extent(IntFlag):
    """What a run of blocks is. HOLE and ZERO are the bits of NBD's base:allocation; the others are ours."""

    HOLE = HOLE_BIT
    ZERO = ZERO_BIT
    SHARED = SHARED_BIT  # with another block of the export; with anybody's where the pool tells that
    HUGE = HUGE_BIT
    SAME_FILLED = SAME_FILLED_BIT


cdef class Blocks:
    """What a disk is beside its content; see disk.pyi."""

    def _bind(self, PoolCore pool, uint32_t number, uint64_t stored, uint64_t same):
        must(not pool.held[number], b"a directory entry is not used again while somebody holds its disk")
        self.pool = pool
        self.number = number
        self._entry = pool.directory.entry(number)
        pool.held[number] = True
        self.generation = self.head().generation
        self.name = pool.directory.name_of(number)
        self.made_read_only = self.head().flags & READ_ONLY_FLAG != 0
        self.concealed = self.head().state == ENTRY_DELETING
        self.domain = domain_of(self.head().flags)
        self.salt = salt_of(self.domain)
        self.size = self.head().size
        self.stored = stored
        self.same = same
        self.summed = pool.sum  # a new one is part of whatever sum is under way, as it adds nothing yet

    def __dealloc__(self):
        if self.pool is not None and self._entry != NULL:
            self.pool.held[self.number] = False

    # -- the export as a whole -------------------------------------------------------------------------------------

    cdef Head* head(self) noexcept nogil:
        """Under the pool's lock: what the directory says of the export, if it is not gone."""
        return self.pool.directory.head(self.number)

    cdef uint64_t* root(self) noexcept nogil:
        """Under the pool's lock: where the export's block table is named; NULL: the export is gone. Whatever became of
        its entry: the root has a check of its own."""
        return NULL if self.gone else &self._entry.root

    cdef uint64_t* sound_root(self) noexcept nogil:
        """The same, for whoever changes what the directory says: NULL too where that is not what was written. A change
        has a check of its own, and would make damage true. A copy is made of what this process knows (_share)."""
        return self.root() if self.pool.directory.is_right(self.number) else NULL

    cdef bint is_sound(self) noexcept nogil:
        """Whether it can be changed."""
        cdef bint sound
        lock_take(&self.pool.lock)
        sound = self.sound_root() != NULL
        lock_leave(&self.pool.lock)
        return sound

    def why_not(self) -> str:
        """Why the export cannot be changed, or copied if it is gone."""
        if self.gone:
            return "it was deleted"
        return "its entry in the export directory is not what was written; clone it, and remove it"

    @property
    def damaged(self):
        return not self.gone and not self.is_sound()

    cdef bint walk(self, Cursor* cursor) noexcept nogil:
        """Under the pool's lock, or in a look: cursor.go_on, the one way in which leaves are walked. A gone export has
        none."""
        return go_on(&self.pool.lock, self.pool.tables, self.root(), NULL, cursor)

    cdef uint64_t end_block(self) noexcept nogil:
        """Behind the last block that belongs to the export."""
        return (self.size + BLOCK - 1) // BLOCK

    def _share_with(self, Blocks twin) -> bool:
        """Make a disk whose entry is written, and no export yet, a clone of this one; for Pool. False: this one is
        gone."""
        cdef uint64_t* root
        lock_take(&self.pool.lock)
        root = self.root()
        if root != NULL:
            self._share(twin)
            self.pool.directory.publish(twin.number, STATE, ENTRY_LIVE)
        lock_leave(&self.pool.lock)
        return root != NULL

    cdef void share_concealed(self, Blocks twin) noexcept nogil:
        """Under the lock: the same, with a twin that nobody is offered yet (moment.pyx). This one is there."""
        twin.concealed = True
        self._share(twin)
        self.pool.directory.publish(twin.number, CONCEALED, CONCEALED_FILLING)

    cdef void _share(self, Blocks twin) noexcept nogil:
        cdef bint sound = self.sound_root() != NULL
        must(not sound or self.head().size == self.size, b"an export has the size that its entry has")
        # Of an entry that is not what was written nobody knows how much behind the end is still to be cleared.
        self.pool.directory.share(twin.number, self.size, self.head().shrinking_from if sound else SIZE_MAX)
        self.pool.tables.share(self.root(), &twin._entry.root)
        twin.size = self.size
        twin._add(self.stored, self.same)

    def _retire(self, bint deleting) -> bool:
        """Every later request fails: the export is being deleted, or the pool closes. False: it was gone before."""
        cdef bint lives
        lock_take(&self.pool.lock)
        lives = self.root() != NULL
        if lives and deleting:
            self.pool.directory.publish(self.number, STATE, ENTRY_DELETING)
            self._add(-<int64_t>self.stored, -<int64_t>self.same)
        amend32(<uint32_t*>&self.gone, 1)  # before anything of it goes: readers without the lock look at it last
        lock_leave(&self.pool.lock)
        return lives

    def _rename(self, str name, bytes encoded) -> bool:
        """Bear another name, which nobody else in the pool has. False: there is no room for it beside the old one."""
        cdef bint sound, done = False
        lock_take(&self.pool.lock)
        sound = self.sound_root() != NULL
        if sound:
            done = self.pool.directory.rename(self.number, <const char*>encoded, <uint32_t>len(encoded))
        lock_leave(&self.pool.lock)
        if not sound:
            raise EngineError(f"cannot rename export {self.name!r}: {self.why_not()}")
        if done:
            self.name = name
        return done

    @property
    def size_bytes(self):
        return self.size

    @property
    def quota_bytes(self):
        return look64(&self.quota) * BLOCK

    @quota_bytes.setter
    def quota_bytes(self, uint64_t quota):
        amend64(&self.quota, (quota + BLOCK - 1) // BLOCK)

    @property
    def read_only(self):
        return self.made_read_only or self.gone

    @property
    def private(self):
        return self.salt != 0

    @property
    def identity(self):
        cdef uint64_t found = 0
        lock_take(&self.pool.lock)
        if self.sound_root() != NULL:  # the other head may name what it held before
            found = self.pool.directory.identity(self.number)
        lock_leave(&self.pool.lock)
        return found

    def identify(self, uint64_t identity):
        lock_take(&self.pool.lock)
        if self.sound_root() != NULL and identity != self.pool.directory.identity(self.number):
            self.pool.directory.identify(self.number, identity)
        lock_leave(&self.pool.lock)

    def _valid(self, uint64_t offset, uint64_t length):
        if offset > self.size or length > self.size - offset:
            raise ValueError(f"{length} bytes at {offset} reach past the end of export {self.name!r}, {self.size}")

    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil:
        """A block came to be stored (1), or is no more (-1), and same-filled."""
        self._add(stored, same)
        if block < self.recounted:
            self.found_stored += stored
            self.found_same += same

    cdef void _add(self, int64_t stored, int64_t same) noexcept nogil:
        """So many blocks more in the export, the pool, and the sum over all exports once this one is part of it.

        A disk that is not offered is none of the pool's content yet: its blocks are told when it is revealed.
        """
        self.stored += stored
        self.same += same
        if self.concealed:
            return
        self.pool.blocks_stored += stored
        self.pool.blocks_same += same
        if self.summed == self.pool.sum:
            self.pool.sum_stored += stored
            self.pool.sum_same += same

    cdef void sum_up(self) noexcept nogil:
        """Under the pool's lock: become part of the sum over all exports that is under way, once."""
        if self.summed != self.pool.sum:
            self.summed = self.pool.sum
            self.pool.sum_stored += 0 if self.concealed else self.stored
            self.pool.sum_same += 0 if self.concealed else self.same

    cdef void reveal(self) noexcept nogil:
        """Under the pool's lock: be offered, and counted, from now on."""
        cdef uint64_t stored = self.stored, same = self.same
        self.concealed = False
        self.stored = self.same = 0
        self._add(stored, same)

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
        self.found_behind = False
        self.wrong = NONE_WRONG
        lock_leave(&self.pool.lock)

    cdef uint32_t count_on(self, uint32_t limit) noexcept nogil:
        """Under the pool's lock: look at up to `limit` entries more of one leaf; how many, 0 at the end of the
        table."""
        cdef Cursor cursor
        cdef uint64_t block, entry
        cdef uint32_t looked = 0
        cursor.next = self.recounted
        cursor.end = <uint64_t>1 << MAX_BLOCKS_SHIFT  # not the size: nothing is to lie behind it
        if not self.walk(&cursor):
            self.recounted = cursor.next
            return 0 if cursor.next == cursor.end else limit
        while looked < limit and next_entry(&cursor, &block, &entry):
            if not self.pool.tables.is_right(entry, block):
                self.wrong = min(self.wrong, block)
            elif not is_hole(entry):
                self.found_stored += 1
                self.found_same += self.pool.tables.is_same(entry)
                if block >= self.end_block() and self.head().shrinking_from <= self.size:
                    self.found_behind = True
            looked += 1
        self.recounted = cursor.next
        return looked

    cdef bint is_wrong(self) noexcept nogil:
        """Whether an entry that was recounted is not right."""
        return self.wrong != NONE_WRONG

    def first_unreadable(self, uint32_t handle):
        """The first block whose entry is not right, or leads to the object of `handle`; None if there is none."""
        cdef Cursor cursor
        cdef uint64_t block = 0, entry
        cdef uint32_t held
        cdef bint found = False
        cursor.next, cursor.end = 0, <uint64_t>1 << MAX_BLOCKS_SHIFT
        with nogil:
            while cursor.next < cursor.end and not found:
                lock_take_behind(&self.pool.lock)
                self.walk(&cursor)
                while not found and next_entry(&cursor, &block, &entry):
                    held = self.pool.tables.handle_at(entry, block)
                    found = (not self.pool.tables.is_right(entry, block)
                             or handle != 0 and held != 0 and self.pool.store.resolve(held) == handle)
                lock_leave(&self.pool.lock)
        return block if found else None

    # -- what the blocks are -------------------------------------------------------------------------------------

    cdef uint32_t kind_bits(self, uint64_t entry, uint64_t block, bint leaf_shared) noexcept nogil:
        """What an entry says of its block, with the pool's lock or beside those who write. leaf_shared: its leaf is."""
        cdef uint32_t handle = entry_handle(entry)
        cdef uint64_t word
        if not self.pool.tables.is_right(entry, block):
            return 0  # no hole: to read it fails
        if is_hole(entry):
            return HOLE_BIT | ZERO_BIT
        if handle == 0:
            return SAME_FILLED_BIT | (ZERO_BIT if repeated_of(entry) == 0 else 0)
        word = look64(&self.pool.store.cells.cell(self.pool.store.resolve(handle)).word)
        if kind_of(word) == KIND_FILL:
            return SAME_FILLED_BIT
        return ((SHARED_BIT if leaf_shared or word >> REFS_SHIFT > 1 else 0)
                | (HUGE_BIT if kind_of(word) == CODEC_RAW else 0))

    def _raise(self, int error, str verb, offset, length):
        if error == 0:
            return
        if error == ENOSPC:
            raise PoolFull(
                f"cannot {verb} {length} bytes at {offset} of export {self.name!r}: "
                f"{full_because(self.pool.mem_limit)}, trim, fold or compact"
            )
        if error == EDQUOT:
            raise PoolFull(
                f"cannot {verb} {length} bytes at {offset} of export {self.name!r}: it may store {self.quota_bytes} "
                "bytes; trim, or raise its quota"
            )
        if error == EINVAL:
            raise ValueError(f"{length} bytes at {offset} reach past the end of export {self.name!r}, {self.size}")
        raise EngineError(f"cannot {verb} {length} bytes at {offset} of export {self.name!r}: "
                          + (self._why_gone() if self.gone or self.pool.closing
                             else "what is stored there is not what was written; run nbdzram check"))

    def _why_gone(self):
        return "its pool was closed" if self.pool.closing else "it was deleted"

    def usage(self):
        cdef PoolCore pool = self.pool
        cdef Cursor cursor
        cdef uint64_t stored = 0, same = 0, compressed = 0, unique = 0, huge = 0
        cdef uint64_t block, entry
        cdef uint32_t handle, length, bits
        cdef bint leaf_shared
        cdef bint inside
        # Of each object with several holders, how many of them are blocks of this export. Only what is counted is
        # resident.
        cdef uint32_t known = look32(&pool.store.cells.high)
        cdef uint32_t* found = <uint32_t*>calloc(known, sizeof(uint32_t))
        if found == NULL:
            raise MemoryError("no memory to count who holds an export's objects")
        cursor.next, cursor.end = 0, self.end_block()
        with nogil:
            inside = users_enter(&pool.users)
            while inside and cursor.next < cursor.end and not users_leaving(&pool.users):
                lock_take(&pool.lock)
                leaf_shared = self.walk(&cursor) and pool.tables.leaf_is_shared(self.root(), cursor.next)
                while next_entry(&cursor, &block, &entry):
                    if is_hole(entry) or not pool.tables.is_right(entry, block):
                        continue
                    stored += 1
                    bits = self.kind_bits(entry, block, leaf_shared)
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
                lock_leave(&pool.lock)
            if inside:
                users_leave(&pool.users)
        free(found)
        return DiskUsage(
            stored=stored * BLOCK, same_filled=same * BLOCK, compressed=compressed, unique=unique,
            shared=compressed - unique, huge=huge * BLOCK,
        )
