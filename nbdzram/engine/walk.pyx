"""What a copy of a disk holds, as a stream tells it: objects as they are stored, and runs of blocks that name them.

    step ── hold: up to HOLD entries, the bytes of their objects copied ── let go: decoded, held against fingerprints
         └─ until there are enough for a record

    object   number 4 | length 2 | codec 1 | 0 1 | XXH3 of the block 8 | the encoded bytes
    run      kind 2 | count 2 | nothing, the repeated word 8, or the number of each block's object 4

Told are the blocks that are not what they are in `origin`, another copy (without one: that are no holes). Where both
lead to the same node, which is most of a tree, nothing below is looked at, so that a walk takes time in proportion to
what differs. Where handles differ it compares what they lead to: a block that was rewritten with the same bytes is no
change.

Invariants
1. Copy and origin are concealed, and nobody writes them: their nodes and entries stay, but for ages. So the number of a
   block is all that a walk remembers from one hold to the next.
2. An object is told once (Told), under the number of a handle that an entry of a copy leads to. As long as the copies
   are there that handle is not freed, whatever folding makes of it, and never means other content.
3. Nothing is told whose bytes did not decode to the content that its fingerprint says.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from nbdzram.engine.arena cimport region_ensure, region_free, region_reserve
from nbdzram.engine.cells cimport KIND_FILL, kind_of, length_of
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_ZSTD_DICT, fingerprint
from nbdzram.engine.cursor cimport go_on, leaf_end, next_entry, origin_entry
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.lock cimport HOLD, HOLD_BYTES, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.must cimport must
from nbdzram.engine.table cimport aged, entry_handle, is_hole, repeated_of
from nbdzram.engine.users cimport users_enter, users_leave, users_leaving

from nbdzram.errors import EngineError

cdef enum:
    RUN_SKIP = 0     # as in the origin
    RUN_HOLE = 1
    RUN_SAME = 2     # the word follows that all its blocks repeat
    RUN_OBJECTS = 3  # the number of each block's object follows
    RUN_HEAD = 4
    RUN_COUNT_MAX = 0xFFFF

    OBJECT_HEAD = 16
    OBJECTS_GOAL = 256 << 10  # of a record: large enough that its frame is nothing, small beside a client's request
    NUMBERS_MAX = OBJECTS_GOAL / OBJECT_HEAD + 1  # objects of a record: each is larger than its head
    RUNS_GOAL = 64 << 10

    STREAM_SEED = 0  # of the hashes in a stream: the pool's own seed is nobody else's business

    NO_TROUBLE = 0
    ROT = 1      # a block is not what was written
    GONE = 2     # a copy was deleted, or the pool closes
    NO_MEMORY = 3


@cython.final
cdef class Told:
    """Which objects of a pool a stream has told: a bit a handle."""

    def __cinit__(self):
        if not region_reserve(&self.bits, <uint64_t>1 << 29, NULL):
            raise EngineError("cannot reserve addresses for a stream; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.bits)

    cdef bint has(self, uint32_t handle) noexcept nogil:
        return handle >> 3 < self.bits.committed and self.bits.base[handle >> 3] >> (handle & 7) & 1

    cdef bint add(self, uint32_t handle) noexcept nogil:
        """False without memory."""
        if not region_ensure(&self.bits, (<uint64_t>handle >> 3) + 1):
            return False
        self.bits.base[handle >> 3] |= 1 << (handle & 7)
        return True

    def forget(self, const uint8_t[::1] numbers not None):
        cdef Py_ssize_t at
        cdef uint32_t handle
        for at in range(0, len(numbers) - 3, 4):
            memcpy(&handle, &numbers[at], 4)
            if self.has(handle):
                self.bits.base[handle >> 3] &= ~(1 << (handle & 7))


@cython.final
cdef class Walk:
    """See walk.pyi."""

    def __cinit__(self, Disk disk not None, Disk origin, Told told not None, uint64_t first=0):
        if origin is not None and origin.pool is not disk.pool:
            raise ValueError("a copy and its origin lie in one pool")
        self.pool = disk.pool
        self.disk = disk
        self.origin = origin
        self.told = told
        self.cursor.end = disk.end_block()
        self.cursor.next = min(first, self.cursor.end)
        self.copies = <uint8_t*>malloc(2 * HOLD * BLOCK)
        self.objects = <uint8_t*>malloc(OBJECTS_GOAL + OBJECT_HEAD + BLOCK)
        self.runs = <uint8_t*>malloc(RUNS_GOAL + 2 * RUN_HEAD + 8)
        self.told_numbers = <uint32_t*>malloc(NUMBERS_MAX * sizeof(uint32_t))
        if self.copies == NULL or self.objects == NULL or self.runs == NULL or self.told_numbers == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.copies)
        free(self.objects)
        free(self.runs)
        free(self.told_numbers)

    def _enter(self):
        if not users_enter(&self.pool.users):
            raise EngineError("the disk was deleted, or its pool closed")

    def step(self):
        self.objects_size = self.runs_size = 0
        self.blocks = 0
        self.told_count = 0
        self.dictionaries = 0
        self._enter()
        with nogil:
            while self._fill():
                pass
            users_leave(&self.pool.users)
        if self.trouble:
            self._raise()
        if self.runs_size == 0:
            return None
        return (
            self.first, self.blocks, self.dictionaries, self.objects[:self.objects_size], self.runs[:self.runs_size])

    @property
    def numbers(self):
        return (<uint8_t*>self.told_numbers)[:self.told_count * sizeof(uint32_t)]

    @property
    def position(self):
        return self.found[self.settled].block if self.settled < self.found_count else self.cursor.next

    @property
    def progress(self):
        """Of the blocks of the disk, the part that is behind."""
        return <double>self.cursor.next / self.cursor.end if self.cursor.end else 1.0

    def _raise(self):
        if self.trouble == ROT:
            raise EngineError(f"block {self.trouble_at} is not what was written; run nbdzram check")
        if self.trouble == NO_MEMORY:
            raise EngineError("no memory to remember which objects were sent")
        raise EngineError("the disk was deleted, or its pool closed")

    # -- a step --------------------------------------------------------------------------------------------------

    cdef bint _fill(self) noexcept nogil:
        """Tell the blocks of one hold. False when the step has enough, or nothing is left, or there is trouble."""
        if self.settled == self.found_count:
            if self.cursor.next >= self.cursor.end or not self._look():
                return False
        while self.settled < self.found_count:
            if self.objects_size >= OBJECTS_GOAL or self.runs_size >= RUNS_GOAL:
                return False
            if self.runs_size and self.found[self.settled].block - self.next > RUN_COUNT_MAX:
                return False  # a record of its own costs less than runs that say nothing
            if not self._settle(self.settled):
                return False
            self.settled += 1
        return True

    cdef bint _look(self) noexcept nogil:
        """Find what is to be told of up to HOLD entries of a leaf, or HOLD_BYTES. False when there is trouble."""
        cdef uint64_t block, entry
        self.found_count = self.settled = self.copied = 0
        lock_take_behind(&self.pool.lock)
        if self._find_leaf():
            while (self.copied < HOLD_BYTES and self.trouble == NO_TROUBLE
                   and next_entry(&self.cursor, &block, &entry)):
                if self._judge(&self.found[self.found_count], block, entry, origin_entry(&self.cursor, block)):
                    self.found_count += 1
        lock_leave(&self.pool.lock)
        return self.trouble == NO_TROUBLE

    cdef bint _find_leaf(self) noexcept nogil:
        """Under the lock: go on to what may differ. False: there is nothing in this hold, or there is trouble."""
        cdef uint64_t* root = self.disk.root()
        cdef uint64_t* origin = NULL if self.origin is None else self.origin.root()
        if root == NULL or self.origin is not None and origin == NULL or users_leaving(&self.pool.users):
            return self._fails(GONE, self.cursor.next)
        if not go_on(&self.pool.lock, self.pool.tables, root, origin, &self.cursor):
            return False
        if self.cursor.leaf == self.pool.tables.no_leaf:
            return self._fails(ROT, self.cursor.next)
        return True

    cdef bint _judge(self, Found* found, uint64_t block, uint64_t entry, uint64_t before) noexcept nogil:
        """Under the lock: whether the block is to be told, and as what."""
        cdef uint64_t expected
        cdef uint32_t handle = entry_handle(entry)
        cdef uint32_t other = 0
        cdef bint known = self.pool.tables.is_right(before, block)  # of what is not, nobody knows if it differs
        found.block = block
        found.kind = found.origin_kind = 0
        if not self.pool.tables.is_right(entry, block):
            return self._fails(ROT, block)
        if known and aged(entry, 0) == aged(before, 0):
            return False
        if handle == 0:
            found.run = RUN_HOLE if is_hole(entry) else RUN_SAME
            found.word = 0 if is_hole(entry) else repeated_of(entry)
            return True
        if not self.pool.store.is_sound(handle, self.pool.store.resolve(handle)):
            return self._fails(ROT, block)
        expected = self.pool.store.cells.cell(handle).fingerprint
        if known and entry_handle(before):
            other = self.pool.store.resolve(entry_handle(before))
            if other == self.pool.store.resolve(handle):
                return False
            if (not self.pool.store.is_sound(entry_handle(before), other)
                    or self.pool.store.cells.cell(other).fingerprint != expected):
                other = 0
        if kind_of(self.pool.store.cells.cell(self.pool.store.resolve(handle)).word) == KIND_FILL:
            found.run = RUN_SAME
            found.word = expected
            return other == 0 or kind_of(self.pool.store.cells.cell(other).word) != KIND_FILL
        found.run = RUN_OBJECTS
        found.word = expected
        found.number = handle if self.told.has(handle) else self.pool.store.resolve(handle)
        if other and kind_of(self.pool.store.cells.cell(other).word) == KIND_FILL:
            other = 0
        if other:
            self._copy(other, self.copies + (HOLD + self.found_count) * BLOCK, &found.origin_kind, &found.origin_length)
        if other or not self.told.has(found.number):
            self._copy(
                self.pool.store.resolve(handle), self.copies + self.found_count * BLOCK, &found.kind, &found.length)
        return True

    cdef void _copy(self, uint32_t handle, uint8_t* target, uint32_t* kind, uint32_t* length) noexcept nogil:
        """Under the lock: an object's bytes, and what they are."""
        cdef uint64_t word = self.pool.store.cells.cell(handle).word
        kind[0] = kind_of(word)
        length[0] = length_of(word)
        memcpy(target, self.pool.store.bytes_at(word), length[0])
        self.copied += length[0]

    cdef bint _settle(self, uint32_t index) noexcept nogil:
        """Without the lock: tell a block, and its object before it. False when there is trouble."""
        cdef uint8_t block[BLOCK]
        cdef uint8_t before[BLOCK]
        cdef Found* found = &self.found[index]
        cdef const uint8_t* encoded = self.copies + index * BLOCK
        if found.run == RUN_OBJECTS and found.kind:
            if not self.pool.store.decode_right(found.kind, encoded, found.length, found.word, block):
                lock_take(&self.pool.lock)
                self.pool.rotten += 1
                lock_leave(&self.pool.lock)
                return self._fails(ROT, found.block)
            if found.origin_kind and self.pool.store.decode(
                    found.origin_kind, encoded + HOLD * BLOCK, found.origin_length, before) and (
                        memcmp(block, before, BLOCK) == 0):
                return True
            if not self.told.has(found.number) and not self._add_object(found, encoded, block):
                return self._fails(NO_MEMORY, found.block)
        self._add_run(found)
        return True

    cdef bint _fails(self, int trouble, uint64_t block) noexcept nogil:
        """False, so that whoever asked ends."""
        self.trouble = trouble
        self.trouble_at = block
        return False

    # -- what is told --------------------------------------------------------------------------------------------

    cdef bint _add_object(self, const Found* found, const uint8_t* encoded, const uint8_t* block) noexcept nogil:
        """An object that is right. False without memory to remember it."""
        cdef uint8_t* target = self.objects + self.objects_size
        cdef uint64_t hashed = fingerprint(block, STREAM_SEED)
        if not self.told.add(found.number):
            return False
        must(self.objects_size < OBJECTS_GOAL, b"there is room for one object more")
        self.told_numbers[self.told_count] = found.number
        self.told_count += 1
        memcpy(target, &found.number, 4)
        target[4] = found.length & 0xFF
        target[5] = found.length >> 8
        target[6] = found.kind
        target[7] = 0
        memcpy(target + 8, &hashed, 8)
        memcpy(target + OBJECT_HEAD, encoded, found.length)
        self.objects_size += OBJECT_HEAD + found.length
        if found.kind >= CODEC_ZSTD_DICT and found.kind < CODEC_ZSTD_DICT + CODEC_DICTS:
            self.dictionaries |= 1 << (found.kind - CODEC_ZSTD_DICT)
        return True

    cdef void _add_run(self, const Found* found) noexcept nogil:
        """One block, to the last run if it goes on with it. There is room for what this adds at most: two heads and a
        word."""
        cdef uint8_t* head
        cdef uint32_t count
        cdef bint goes_on = False
        if self.runs_size == 0:
            self.first = self.next = found.block
        elif found.block > self.next:
            self._begin_run(RUN_SKIP, <uint32_t>(found.block - self.next))
        else:
            head = self.runs + self.run_at
            count = head[2] | <uint32_t>head[3] << 8
            goes_on = head[0] == found.run and count < RUN_COUNT_MAX and (
                found.run != RUN_SAME or memcmp(head + RUN_HEAD, &found.word, 8) == 0)
            if goes_on:
                head[2] = (count + 1) & 0xFF
                head[3] = (count + 1) >> 8
        if not goes_on:
            self._begin_run(found.run, 1)
            if found.run == RUN_SAME:
                memcpy(self.runs + self.runs_size, &found.word, 8)
                self.runs_size += 8
        if found.run == RUN_OBJECTS:
            memcpy(self.runs + self.runs_size, &found.number, 4)
            self.runs_size += 4
        self.next = found.block + 1
        self.blocks += 1

    cdef void _begin_run(self, uint32_t kind, uint32_t count) noexcept nogil:
        cdef uint8_t* head = self.runs + self.runs_size
        head[0] = kind
        head[1] = 0
        head[2] = count & 0xFF
        head[3] = count >> 8
        self.run_at = self.runs_size
        self.runs_size += RUN_HEAD


def leaves_apart(Disk disk not None, Disk origin, uint64_t limit) -> int:
    """How many leaves of a copy a walk would look at, up to `limit`. May take milliseconds."""
    cdef Walk walk = Walk(disk, origin, Told())
    cdef uint64_t found = 0
    walk._enter()
    with nogil:
        while walk.cursor.next < walk.cursor.end and found < limit and walk.trouble == NO_TROUBLE:
            lock_take_behind(&walk.pool.lock)
            if walk._find_leaf():
                found += 1
                walk.cursor.next = leaf_end(&walk.cursor)
            lock_leave(&walk.pool.lock)
        users_leave(&walk.pool.users)
    return found if walk.trouble == NO_TROUBLE else limit


def blocks_apart(Disk disk not None, Disk origin, uint64_t limit) -> int:
    """How many blocks of a copy a walk would tell, up to `limit`, or a few more that are the same bytes."""
    cdef Walk walk = Walk(disk, origin, Told())
    cdef uint64_t found = 0
    walk._enter()
    with nogil:
        while walk.cursor.next < walk.cursor.end and found < limit and walk._look():
            found += walk.found_count
        users_leave(&walk.pool.users)
    return found if walk.trouble == NO_TROUBLE else limit
