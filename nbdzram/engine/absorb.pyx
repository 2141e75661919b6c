"""What a stream tells, made true in concealed disks: objects as they come, then the blocks that name them.

    objects   number -> staging disk, block `number`        whatever number the sender gave them
    blocks    staging disk, block `number` -> disk, block   one holder more of the same object

A staging disk is concealed as the others are, and is deleted when the stream has ended. So what has come is held by
block tables from the first moment: a kill leaves nothing, a check counts it, and it needs no memory but theirs. There
is one for each folding domain, as content of two domains never shares an object.

Invariants
1. Nothing is stored that did not decode to the content whose hash came with it.
2. What is there already is used as it is (prepare_encoded compares the content), so that a stream folds into the pool.
3. A dictionary that the pool has no place for is used for reading alone: its objects are encoded again.
"""

cimport cython
from libc.errno cimport EINVAL, EIO, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.codec cimport (
    BLOCK, CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_DICT, fingerprint, lz4_decompress, zstd_compress,
    zstd_decompress, zstd_free_compressor, zstd_free_ddict, zstd_new_compressor, zstd_new_ddict,
)
from nbdzram.engine.cells cimport KIND_FILL
from nbdzram.engine.compact cimport make_room
from nbdzram.engine.dictionary cimport LARGEST_DICTIONARY, NO_DICTIONARY, find_dictionary, keep_dictionary
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.leaf cimport ANYWHERE, own_leaf
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.prepare cimport RUN, Prepared, prepare_encoded
from nbdzram.engine.store cimport HUGE_LENGTH
from nbdzram.engine.table cimport LEAF_BLOCKS, aged, entry_word
from nbdzram.engine.users cimport users_enter, users_leave

from nbdzram.errors import EngineError, PoolFull, StreamError, full_because

cdef enum:
    # Of a stream, as walk.pyx writes them.
    RUN_SKIP = 0
    RUN_HOLE = 1
    RUN_SAME = 2
    RUN_OBJECTS = 3
    RUN_HEAD = 4
    OBJECT_HEAD = 16
    STREAM_SEED = 0

    LEVEL = 3  # of Zstandard, for what is encoded again: as `recompress` does by default

    # What may be wrong with a stream; above the values of errno.
    CUT = 1000
    NO_CODEC
    WRONG_CONTENT
    NO_OBJECT
    NO_RUN
    BEHIND_THE_END
    OTHER_DOMAIN

cdef dict WRONG = {
    CUT: "a record ends in the middle of what begins with byte {number} of its list",
    NO_CODEC: "object {number} is encoded in a way that there is not",
    WRONG_CONTENT: "object {number} is not the content that was sent",
    NO_OBJECT: "a block names object {number}, which has not come",
    NO_RUN: "a run of blocks is of kind {number}, which there is not",
    OTHER_DOMAIN: "an export and its objects are of two folding domains",
    BEHIND_THE_END: "block {number} lies behind the end of its disk",
}


@cython.final
cdef class Absorber:
    """See absorb.pyi."""

    cdef PoolCore pool
    cdef void* ddicts[CODEC_DICTS]  # of the stream
    cdef int places[CODEC_DICTS]    # where the pool has them
    cdef void* compressor
    cdef uint64_t number            # what an error is about
    cdef readonly uint64_t objects, object_bytes, objects_folded, objects_encoded_again, blocks

    def __cinit__(self, PoolCore pool not None):
        self.pool = pool
        self.compressor = zstd_new_compressor(LEVEL)
        if self.compressor == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int number
        zstd_free_compressor(self.compressor)
        for number in range(CODEC_DICTS):
            zstd_free_ddict(self.ddicts[number])

    def dictionary(self, int number, const uint8_t[::1] content not None):
        cdef uint32_t length = <uint32_t>len(content)
        cdef int place
        if not 0 <= number < CODEC_DICTS or not 0 < length <= LARGEST_DICTIONARY:
            raise StreamError(f"the stream is damaged: there is no dictionary {number} of {length} bytes")
        self._enter()
        with nogil:
            zstd_free_ddict(self.ddicts[number])
            self.ddicts[number] = zstd_new_ddict(&content[0], length)
            lock_take(&self.pool.maintenance)
            place = find_dictionary(self.pool, &content[0], length)
            if place == NO_DICTIONARY:
                place = keep_dictionary(self.pool, &content[0], length)
            lock_leave(&self.pool.maintenance)
            self.places[number] = place
            users_leave(&self.pool.users)
        if self.ddicts[number] == NULL:
            raise MemoryError

    def take_objects(self, Disk staging not None, const uint8_t[::1] body not None):
        cdef int error
        cdef size_t size = len(body)
        self._enter()
        with nogil:
            error = self._objects(staging, &body[0], size) if size else 0
            users_leave(&self.pool.users)
        self._raise(error)

    def take_blocks(self, Disk disk not None, Disk staging not None, uint64_t first, const uint8_t[::1] runs not None):
        cdef int error
        cdef size_t size = len(runs)
        self._enter()
        with nogil:
            error = self._blocks(disk, staging, first, &runs[0], size) if size else 0
            users_leave(&self.pool.users)
        self._raise(error)

    def end_disk(self, Disk disk not None):
        cdef int error
        self._enter()
        with nogil:
            error = disk.clear_behind(0)
            users_leave(&self.pool.users)
        self._raise(error)

    def _enter(self):
        if not users_enter(&self.pool.users):
            raise EngineError("a stream cannot be received: its pool was closed")

    def _raise(self, int error):
        if error == 0:
            return
        if error == ENOSPC:
            raise PoolFull(
                f"the stream does not fit: {full_because(self.pool.mem_limit)}, remove exports, fold or compact"
            )
        if error in WRONG:
            raise StreamError("the stream is damaged: " + WRONG[error].format(number=self.number))
        raise EngineError("a disk that was being received is gone, or what is stored for it is not what was written")

    cdef int _fails(self, int error, uint64_t number) noexcept nogil:
        self.number = number
        return error

    # -- objects -------------------------------------------------------------------------------------------------

    cdef int _objects(self, Disk staging, const uint8_t* body, size_t size) noexcept nogil:
        cdef size_t at = 0
        cdef uint32_t number, length, kind
        cdef uint64_t hashed
        cdef int error
        while at < size:
            if size - at < OBJECT_HEAD:
                return self._fails(CUT, at)
            memcpy(&number, body + at, 4)
            length = body[at + 4] | <uint32_t>body[at + 5] << 8
            kind = body[at + 6]
            memcpy(&hashed, body + at + 8, 8)
            if length > size - at - OBJECT_HEAD or length > BLOCK or length == 0 or body[at + 7]:
                return self._fails(CUT, at)
            error = self._object(staging, number, kind, body + at + OBJECT_HEAD, length, hashed)
            if error:
                return error
            at += OBJECT_HEAD + length
        return 0

    cdef int _object(
        self, Disk staging, uint32_t number, uint32_t kind, const uint8_t* encoded, uint32_t length, uint64_t hashed
    ) noexcept nogil:
        """Store one object, or find it stored, as block `number` of the staging disk."""
        cdef uint8_t block[BLOCK]
        cdef uint8_t again[BLOCK]
        cdef Prepared prepared
        cdef uint32_t stored
        cdef bint waited = False
        cdef bint is_there = False
        cdef int error = self._decode(number, kind, encoded, length, block)
        if error:
            return error
        if fingerprint(block, STREAM_SEED) != hashed:
            return self._fails(WRONG_CONTENT, number)
        if kind >= CODEC_ZSTD_DICT and self.places[kind - CODEC_ZSTD_DICT] == NO_DICTIONARY:
            self.objects_encoded_again += 1
            length = zstd_compress(self.compressor, NULL, block, again, HUGE_LENGTH - 1)
            encoded, kind = again, CODEC_ZSTD
        elif kind >= CODEC_ZSTD_DICT:
            kind = CODEC_ZSTD_DICT + self.places[kind - CODEC_ZSTD_DICT]
        if length == 0 or length >= HUGE_LENGTH:
            encoded, length, kind = block, BLOCK, CODEC_RAW
        while True:
            self.pool.keep_short()
            is_there = prepare_encoded(self.pool, staging.salt, block, encoded, length, kind, &prepared)
            lock_take(staging._stripe(number))
            error = staging._commit(number, 1, &prepared, (<uint64_t>number + 1) * BLOCK, &stored)
            lock_leave(staging._stripe(number))
            if error != ENOSPC or not make_room(self.pool, &waited):
                break
        self.objects_folded += is_there
        self.objects += 1
        self.object_bytes += length
        return self._fails(BEHIND_THE_END, number) if error == EINVAL else error

    cdef int _decode(
        self, uint32_t number, uint32_t kind, const uint8_t* encoded, uint32_t length, uint8_t* block
    ) noexcept nogil:
        cdef bint right = False
        cdef uint32_t dictionary = kind - CODEC_ZSTD_DICT
        if kind == CODEC_RAW:
            right = length == BLOCK
            memcpy(block, encoded, length)
        elif kind == CODEC_LZ4:
            right = lz4_decompress(encoded, length, block)
        elif kind == CODEC_ZSTD:
            right = zstd_decompress(NULL, encoded, length, block)
        elif kind >= CODEC_ZSTD_DICT and dictionary < CODEC_DICTS and self.ddicts[dictionary] != NULL:
            right = zstd_decompress(self.ddicts[dictionary], encoded, length, block)
        else:
            return self._fails(NO_CODEC, number)
        return 0 if right else self._fails(WRONG_CONTENT, number)

    # -- blocks --------------------------------------------------------------------------------------------------

    cdef int _blocks(self, Disk disk, Disk staging, uint64_t block, const uint8_t* runs, size_t size) noexcept nogil:
        cdef size_t at = 0
        cdef uint32_t kind, count
        cdef uint64_t word
        cdef int error = 0
        if disk.salt != staging.salt:
            return self._fails(OTHER_DOMAIN, 0)
        while at < size and error == 0:
            if size - at < RUN_HEAD:
                return self._fails(CUT, at)
            kind = runs[at] | <uint32_t>runs[at + 1] << 8
            count = runs[at + 2] | <uint32_t>runs[at + 3] << 8
            at += RUN_HEAD
            if block > disk.end_block() or count > disk.end_block() - block:
                return self._fails(BEHIND_THE_END, block)
            if kind == RUN_HOLE:
                error = disk._clear(block, block + count)
            elif kind == RUN_SAME:
                if size - at < 8:
                    return self._fails(CUT, at)
                memcpy(&word, runs + at, 8)
                at += 8
                error = self._repeat(disk, block, count, word)
            elif kind == RUN_OBJECTS:
                if size - at < <size_t>count * 4:
                    return self._fails(CUT, at)
                error = self._refer(disk, staging, block, count, runs + at)
                at += <size_t>count * 4
            elif kind != RUN_SKIP:
                return self._fails(NO_RUN, kind)
            if kind != RUN_SKIP:
                self.blocks += count
            block += count
        return error

    cdef int _repeat(self, Disk disk, uint64_t block, uint32_t count, uint64_t word) noexcept nogil:
        """Blocks that repeat a word."""
        cdef Prepared prepared[RUN]
        cdef uint64_t end = block + count
        cdef uint32_t some, stored
        cdef bint waited = False
        cdef int error
        for some in range(RUN):
            prepared[some].handle = 0
            prepared[some].kind = KIND_FILL
            prepared[some].word = word
        while block < end:
            some = <uint32_t>min(min(end - block, <uint64_t>RUN), LEAF_BLOCKS - block % LEAF_BLOCKS)
            self.pool.keep_short()
            lock_take(disk._stripe(block))
            error = disk._commit(block, some, prepared, block * BLOCK, &stored)
            lock_leave(disk._stripe(block))
            waited = waited and stored == 0
            if error and not (error == ENOSPC and make_room(self.pool, &waited)):
                return error
            block += stored
        return 0

    cdef int _refer(
        self, Disk disk, Disk staging, uint64_t block, uint32_t count, const uint8_t* numbers
    ) noexcept nogil:
        """Blocks that are objects which have come."""
        cdef uint64_t end = block + count
        cdef uint64_t first = block
        cdef uint64_t stop, before
        cdef bint waited = False
        cdef int error
        while block < end:
            stop = min(min(end, block + HOLD), (block | (LEAF_BLOCKS - 1)) + 1)
            before = block
            self.pool.keep_short()
            lock_take(disk._stripe(before))
            lock_take(&self.pool.lock)
            error = ENOSPC
            if self.pool.may_retire():
                error = self._refer_some(disk, staging, &block, stop, numbers + (block - first) * 4)
            lock_leave(&self.pool.lock)
            lock_leave(disk._stripe(before))
            waited = waited and block == before
            if error and not (error == ENOSPC and make_room(self.pool, &waited)):
                return error
        return 0

    cdef int _refer_some(
        self, Disk disk, Disk staging, uint64_t* block, uint64_t stop, const uint8_t* numbers
    ) noexcept nogil:
        """Under stripe and lock: up to HOLD of one leaf; block[0] moves behind those that are done."""
        cdef uint64_t* staged
        cdef uint64_t* leaf
        cdef uint64_t* there
        cdef uint64_t entry
        cdef uint32_t number, handle
        cdef int error
        leaf = own_leaf(disk, block[0], ANYWHERE, False, &error)
        if leaf == NULL:
            return error
        staged = staging.root()
        if staged == NULL:
            return EIO
        while block[0] < stop:
            memcpy(&number, numbers, 4)
            there = self.pool.tables.leaf(staged, number)
            handle = self.pool.tables.handle_at(there[number % LEAF_BLOCKS], number) if there != NULL else 0
            if handle == 0:
                return self._fails(NO_OBJECT, number)
            if not self.pool.store.acquire(handle):
                return ENOSPC
            entry = entry_word(self.pool.seed, block[0], handle, self.pool.store.cells.cell(handle).fingerprint)
            disk._swap(leaf, block[0], aged(entry, self.pool.now), False)
            numbers += 4
            block[0] += 1
        return 0
