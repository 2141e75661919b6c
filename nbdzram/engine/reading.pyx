"""Reading blocks without a lock.

    root ─> node ─> ... ─> leaf ─> entry ──> cell ─> (forward ─> cell) ─> slot ─> decoded where it lies, into the target
      └───── the same words still? ──┘         └ word and fingerprint

The thread is online (quiescence.pyx): what it finds may be changed and freed meanwhile, but is nobody else's before it
is offline. So an entry's handle is still that handle, its fingerprint the one of that content, and a slot's bytes those
that were in it when the word was read. What that alone does not give:

1. The entry is that of its block at one moment. A leaf that two exports share is another's alone once this one has left
   it for a copy, and is changed by that other then. An export that has left a node never comes back to it, nor is the
   node another node soon: so if all the words that led down still say so after the entry was read, they said so at that
   moment.
2. The export lives. `gone` is set before the first entry of a deletion is cleared, and looked at behind the entry.
3. The object lives, or did a moment ago. A cell that is free says that the entry has changed since.

Where one of them fails, and where anything is not right in itself, the block is looked at again, under the lock: only
what is not right there is rot.

A reader writes one thing: the age of the entry, by compare-and-swap and at most once a minute.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.cells cimport (
    KIND_FILL, KIND_FORWARD, Cell, fill_word, kind_of, length_of, slot_of, target_of, unit_of,
)
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_FREE, CODEC_RAW, CODEC_ZSTD_DICT, fill
from nbdzram.engine.foresight cimport FORESEEN, foresee_reading
from nbdzram.engine.lock cimport lock_leave, lock_step_aside, lock_take
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.publish cimport exchange64, look32, look64, tally
from nbdzram.engine.quiescence cimport offline, online, quiescent
from nbdzram.engine.store cimport FORWARDS_MAX
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, TOP_LEVEL, aged, branch_word, entry_handle, entry_word, hole_word,
    page_of, repeated_of, same_entry,
)
from nbdzram.engine.users cimport users_enter, users_leave

cdef enum:
    QUIET_BLOCKS = 64  # read between two quiescent moments of a long request: some 60 us
    WORDS = TOP_LEVEL + 1  # from a root to the word that names a leaf

cdef struct Sight:
    # What was seen of a block.
    uint64_t entry
    uint64_t* place       # where the entry stands; NULL: where a whole subtree is holes
    uint64_t word         # of the object's cell; 0: there is none, and `repeated` is what the block repeats
    uint64_t fingerprint  # ... its fingerprint
    uint64_t repeated


cdef int read_range(Blocks disk, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil:
    """Bytes of an export, which lie inside it. 0 or an errno value."""
    cdef int error = EIO
    if online():
        if not look32(&disk.pool.closing):  # who closes it waits for all that are online
            error = _read_range(disk.pool, disk, offset, length, target, True)
        offline()
    elif users_enter(&disk.pool.users):
        error = _read_range(disk.pool, disk, offset, length, target, False)
        users_leave(&disk.pool.users)
    return error


cdef int read_block(Blocks disk, uint64_t block, uint8_t* target) noexcept nogil:
    """A whole block, for a user of the pool who is going to change it. 0 or an errno value."""
    cdef int error
    if not online():
        return _look_again(disk.pool, disk, block, 0, BLOCK, target)
    error = _read_part(disk.pool, disk, block, 0, BLOCK, target)
    offline()
    return error


cdef int _read_range(
    PoolCore pool, Blocks disk, uint64_t offset, uint64_t length, uint8_t* target, bint is_online
) noexcept nogil:
    cdef uint64_t done = 0
    cdef uint64_t block
    cdef uint32_t start, count
    cdef uint32_t blocks = 0
    cdef int error = 0
    while done < length and error == 0:
        block = (offset + done) // BLOCK
        start = (offset + done) % BLOCK
        count = <uint32_t>min(<uint64_t>BLOCK - start, length - done)
        if is_online:
            if blocks % FORESEEN == 0:
                foresee_reading(pool, disk, block, (start + length - done + BLOCK - 1) // BLOCK)
            error = _read_part(pool, disk, block, start, count, target + done)
        else:
            error = _look_again(pool, disk, block, start, count, target + done)
        done += count
        blocks += 1
        if blocks % QUIET_BLOCKS == 0:
            quiescent()
            if look32(&disk.pool.closing):  # who closes the pool waits for this thread no longer
                return EIO
    return error


cdef int _read_part(
    PoolCore pool, Blocks disk, uint64_t block, uint32_t start, uint32_t count, uint8_t* target
) noexcept nogil:
    """`count` bytes of a block from its byte `start`, by a thread that is online."""
    cdef uint8_t whole[BLOCK]
    cdef uint8_t* decoded = target if count == BLOCK else whole
    cdef Sight sight
    if not (_see_entry(pool, disk, block, &sight) and _see_object(pool, block, &sight)):
        tally(&pool.looked_again)
        return _look_again(pool, disk, block, start, count, target)
    if sight.place != NULL and entry_handle(sight.entry) and aged(sight.entry, pool.now) != sight.entry:
        exchange64(sight.place, sight.entry, aged(sight.entry, pool.now))
    if sight.word == 0:
        fill(target, count, sight.repeated, start % 8)
        return 0
    if (not pool.store.decode(kind_of(sight.word), pool.store.bytes_at(sight.word), length_of(sight.word), decoded)
            or pool.verify_on and not pool.store.is_block(decoded, sight.fingerprint)):
        tally(&pool.misread)
        return _look_again(pool, disk, block, start, count, target)
    if count < BLOCK:
        memcpy(target, whole + start, count)
    return 0


cdef bint _see_entry(PoolCore pool, Blocks disk, uint64_t block, Sight* sight) noexcept nogil:
    """Find the entry of a block as it is at one moment. False: it changed meanwhile, or is not right."""
    cdef uint64_t* places[WORDS]
    cdef uint64_t words[WORDS]
    cdef uint64_t* place = &disk._entry.root
    cdef uint64_t seed = pool.seed
    cdef uint64_t number
    cdef int level = TOP_LEVEL + 1
    cdef int index = 0
    while level:
        if pool.pausing and index:
            lock_step_aside(&pool.lock, b"a reader below the root")
        places[index] = place
        words[index] = look64(place)
        number = block >> (level * BRANCH_SHIFT) if level <= TOP_LEVEL else disk.number
        if words[index] != branch_word(seed, level, number, page_of(words[index])):
            return False
        index += 1
        if page_of(words[index - 1]) == 0:
            break
        level -= 1
        place = (<uint64_t*>(pool.arena.base + <uint64_t>page_of(words[index - 1]) * PAGE_SIZE)
                 + (block >> (level * BRANCH_SHIFT) & (BRANCH_CHILDREN - 1)))
    if level:
        sight.place = NULL
        sight.entry = 0
        index -= 1  # the last word says a hole, and is the entry itself
    else:
        if pool.pausing:
            lock_step_aside(&pool.lock, b"a reader before an entry")
        sight.place = place
        sight.entry = look64(place)
    if pool.pausing:
        lock_step_aside(&pool.lock, b"a reader behind an entry")
    while index:
        index -= 1
        if look64(places[index]) != words[index]:
            return False
    return not look32(<uint32_t*>&disk.gone)


cdef bint _see_object(PoolCore pool, uint64_t block, Sight* sight) noexcept nogil:
    """Find what an entry leads to. False: it is gone, or not right."""
    cdef uint32_t handle = entry_handle(sight.entry)
    cdef uint32_t high, length
    cdef Cell* cell
    cdef int steps = 0
    sight.word = 0
    sight.repeated = 0
    if sight.place == NULL:
        return True
    if sight.entry & 1:
        sight.repeated = repeated_of(sight.entry)
        return sight.entry == same_entry(pool.seed, block, sight.repeated)
    if handle == 0:
        return aged(sight.entry, 0) == hole_word(pool.seed, block)
    high = look32(&pool.store.cells.high)
    if handle >= high:
        return False
    cell = pool.store.cells.cell(handle)
    sight.word = look64(&cell.word)
    sight.fingerprint = cell.fingerprint
    if kind_of(sight.word) == CODEC_FREE or (
            aged(sight.entry, 0) != entry_word(pool.seed, block, handle, sight.fingerprint)):
        return False
    while kind_of(sight.word) == KIND_FORWARD:
        steps += 1
        if steps > FORWARDS_MAX or target_of(sight.word) >= high:
            return False
        if pool.pausing:
            lock_step_aside(&pool.lock, b"a reader before a forward")
        cell = pool.store.cells.cell(target_of(sight.word))
        sight.word = look64(&cell.word)
        if cell.fingerprint != sight.fingerprint:
            return False
    if pool.pausing:
        lock_step_aside(&pool.lock, b"a reader before an object")
    if kind_of(sight.word) == KIND_FILL:
        sight.repeated = sight.fingerprint
        if sight.word << 9 >> 9 != fill_word(pool.seed, sight.fingerprint):
            return False
        sight.word = 0
        return True
    length = length_of(sight.word)
    return CODEC_RAW <= kind_of(sight.word) < CODEC_ZSTD_DICT + CODEC_DICTS and (
        pool.store.slab.offset_of(unit_of(sight.word), slot_of(sight.word), length) + length
        <= <uint64_t>look32(&pool.arena.unit_high) * UNIT_SIZE)


cdef int _look_again(
    PoolCore pool, Blocks disk, uint64_t block, uint32_t start, uint32_t count, uint8_t* target
) noexcept nogil:
    """_read_part under the pool's lock, on a copy of the object's bytes: what is not right here is rot."""
    cdef uint8_t encoded[BLOCK]
    cdef uint8_t whole[BLOCK]
    cdef uint8_t* decoded = target if count == BLOCK else whole
    cdef uint64_t* root
    cdef uint64_t* leaf
    cdef uint64_t entry = 0
    cdef uint64_t word, fingerprint
    cdef uint32_t handle, first
    lock_take(&pool.lock)
    root = disk.root()
    if root == NULL:
        lock_leave(&pool.lock)
        return EIO
    leaf = pool.tables.leaf(root, block)
    if leaf != NULL:
        entry = look64(leaf + block % LEAF_BLOCKS)  # others who read it may make it younger
        if not pool.tables.is_right(entry, block):
            return _rot(disk, block)
    first = entry_handle(entry)
    if first == 0:
        lock_leave(&pool.lock)
        fill(target, count, repeated_of(entry) if entry & 1 else 0, start % 8)
        return 0
    handle = pool.store.resolve(first)
    word = pool.store.cells.cell(handle).word
    fingerprint = pool.store.cells.cell(handle).fingerprint
    if not pool.store.is_sound(first, handle):
        return _rot(disk, block)
    if kind_of(word) == KIND_FILL:
        lock_leave(&pool.lock)
        fill(target, count, fingerprint, start % 8)
        return 0
    memcpy(encoded, pool.store.bytes_at(word), length_of(word))
    lock_leave(&pool.lock)
    if (not pool.store.decode(kind_of(word), encoded, length_of(word), decoded)
            or pool.verify_on and not pool.store.is_block(decoded, fingerprint)):
        lock_take(&pool.lock)
        return _rot(disk, block)
    if count < BLOCK:
        memcpy(target, whole + start, count)
    return 0


cdef int _rot(Blocks disk, uint64_t block) noexcept nogil:
    """Leave the pool's lock: what is stored for a block is not what was written, and nobody is to have it."""
    disk.pool.rotten += 1
    disk.pool.rotten_export = disk.number
    disk.pool.rotten_block = block
    lock_leave(&disk.pool.lock)
    return EIO
