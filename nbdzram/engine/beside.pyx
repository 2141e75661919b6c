"""Writing beside others: blocks get their new content, or become holes, on the shared side of the pool's lock
(sides.pxd).

    stripe ── beside ── the leaf, if all on the way is the export's own
                        each block   handle and slot from the thread's kit (kit.pyx); bytes; cell; index (a latch);
                                     swap the entry in one store; the object that goes: index, cell, into the kit
    whatever is not as usual is left to whoever has the lock alone (Disk._commit, _clear_leaf), from the first such
    block on

What is as usual: the leaf is there and no clone shares it, the old entry is right, what it leads to is no forward and
no repeated word with a handle, and has no more holders than a word counts; nobody found the new content stored already;
a handle and a slot can be had; no check is under way; the limit is not near. All of it is looked at before anything of
a block is changed, and none of it can change meanwhile, but by those who are beside:

Who else is beside, and may want the same
    entry      nobody: the caller has the leaf's stripe. Readers age it, by compare-and-swap
    nodes      nobody: they come, go and change their parents when somebody has the lock alone
    cell       of a new object nobody. Of one that others hold: whoever releases it. One holder less is one atomic
               subtraction, and whoever takes the last away has it to himself: nobody adds a holder beside others
    bucket     has its latch. Equal content has an equal fingerprint, and so one latch
    pending, tried     a bit a handle: set and cleared by atomic operations, for the sake of what stands beside it
    slot, handle       of the kit alone; what goes through the depot has its lock
    counters   an export's, and the blocks of all: atomic, when they change. All others are tallied in the kit
    quota      a block more is counted before it is stored, by compare-and-swap, so that all beside stay within it

Crash rules: those of a write that has the lock alone, store for store: bytes, cell, entry, and only then the old cell.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.cells cimport (
    KIND_FILL, REFS_MAX, REFS_SHIFT, Cell, kind_of, length_of, object_word, slot_of, unit_of,
)
from nbdzram.engine.codec cimport CODEC_DICTS, CODEC_LZ4, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.kit cimport Kit, expect_slot, has_handle, has_room, has_slot, kit_of_thread, let_go, outgrows
from nbdzram.engine.ledger cimport ledger_is_near
from nbdzram.engine.lock cimport lock_leave_beside, lock_take_beside
from nbdzram.engine.must cimport must, must_debug
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.page cimport PAGE_SIZE
from nbdzram.engine.prefetch cimport prefetch
from nbdzram.engine.prepare cimport Prepared
from nbdzram.engine.publish cimport add64, exchange64, look32, look64, publish64, subtract64
from nbdzram.engine.slab cimport RELEASED, can_lie, retired_slot, retired_unit, retired_word
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, PARENTS_MASK, TOP_LEVEL, aged, branch_word, entry_handle, entry_word,
    hole_word, page_of, repeated_of, same_entry,
)

cdef struct Old:
    # What a block was.
    uint32_t handle  # of the object that it holds; 0: none
    uint64_t word    # of its cell, as it was just now
    bint stored      # no hole
    bint same        # every word of it repeats the first

cdef struct Gain:
    # What writes have added to their export's blocks.
    int64_t stored
    int64_t same
    int64_t counted  # of those stored, what the export counts already: it has a quota


cdef uint32_t write_beside(
    PoolCore pool, Blocks disk, uint64_t first, uint32_t count, const Prepared* prepared, uint64_t end
) noexcept nogil:
    """Give blocks of one leaf their new content, in order; how many were stored. Why the next was not, whoever has the
    lock alone finds out. The caller holds the leaf's stripe; see Disk._commit."""
    cdef Kit* kit = kit_of_thread(&pool.sides)
    cdef uint64_t* leaf
    cdef uint32_t done = 0
    cdef Gain gain = Gain(0, 0, 0)
    if kit == NULL:
        return 0  # it writes alone
    leaf = _begin(pool, disk, kit, first, count)
    if leaf != NULL and end <= disk.size:
        while done < count and _replace(
                pool, disk, kit, leaf + (first + done) % LEAF_BLOCKS, first + done, &prepared[done], &gain):
            done += 1
    _end(pool, disk, kit, &gain)
    return done


cdef uint32_t clear_beside(PoolCore pool, Blocks disk, uint64_t first, uint32_t count, bint last) noexcept nogil:
    """Make blocks of one leaf holes, in order; how many are. The caller holds the leaf's stripe; see Disk._clear_leaf.

    `last`: of the range no more is in this leaf. Where nothing would be left in it then, the last block is left to
    whoever has the lock alone, and gives the leaf back with it.
    """
    cdef Kit* kit = kit_of_thread(&pool.sides)
    cdef uint64_t* leaf
    cdef uint32_t done = 0
    cdef Gain gain = Gain(0, 0, 0)
    if kit == NULL:
        return 0
    leaf = _begin(pool, disk, kit, first, count)
    if leaf != NULL:
        while done < count and not (last and done + 1 == count and _is_bare_but_for(pool, leaf, first + done)) and (
                _clear(pool, kit, leaf + (first + done) % LEAF_BLOCKS, first + done, &gain)):
            done += 1
    _end(pool, disk, kit, &gain)
    return done


cdef uint64_t* _begin(PoolCore pool, Blocks disk, Kit* kit, uint64_t first, uint32_t count) noexcept nogil:
    """Go beside others; _end follows in any case. The leaf of blocks that are about to change, with room in the kit for
    what goes; NULL: something is not as usual."""
    cdef uint64_t* leaf = NULL
    lock_take_beside(&pool.lock, &kit.seat)
    if pool.store.cells.census is None and not ledger_is_near(&pool.arena.ledger):
        leaf = _own_leaf(pool, disk, first)
    if leaf == NULL or not has_room(kit, pool.store, count):
        return NULL
    _bring_near(pool, leaf, first, count)
    return leaf


cdef void _end(PoolCore pool, Blocks disk, Kit* kit, const Gain* gain) noexcept nogil:
    cdef bint outgrown
    if gain.stored or gain.same:
        _count(pool, disk, gain)
    outgrown = outgrows(kit, pool.store)
    lock_leave_beside(&pool.lock, &kit.seat)
    if outgrown:
        pool.fit_index()


cdef bint _is_bare_but_for(PoolCore pool, const uint64_t* leaf, uint64_t block) noexcept nogil:
    """Whether a leaf has nothing but holes beside this block."""
    cdef uint64_t first = block - block % LEAF_BLOCKS
    cdef uint64_t at
    for at in range(first, first + LEAF_BLOCKS):
        if at != block and aged(look64(leaf + at - first), 0) != hole_word(pool.seed, at):
            return False
    return True


cdef uint64_t* _own_leaf(PoolCore pool, Blocks disk, uint64_t block) noexcept nogil:
    """The 512 entries among which `block` is; NULL: there are none yet, others share them, or something is not
    right."""
    cdef uint64_t* place = disk.root()
    cdef uint64_t number
    cdef uint32_t page
    cdef int level = TOP_LEVEL + 1
    if place == NULL:
        return NULL
    while level:
        page = page_of(place[0])
        number = block >> (level * BRANCH_SHIFT) if level <= TOP_LEVEL else disk.number
        if page == 0 or place[0] != branch_word(pool.seed, level, number, page) or (
                (<uint32_t*>pool.tables.refs.base)[page] & PARENTS_MASK != 1):
            return NULL
        level -= 1
        place = <uint64_t*>(pool.arena.base + <uint64_t>page * PAGE_SIZE)
        if level:
            place += block >> (level * BRANCH_SHIFT) & (BRANCH_CHILDREN - 1)
    return place


cdef void _bring_near(PoolCore pool, const uint64_t* leaf, uint64_t first, uint32_t count) noexcept nogil:
    """The cells of the objects that go are looked at soon, and lie anywhere."""
    cdef uint32_t high = look32(&pool.store.cells.high)
    cdef uint32_t index, handle
    for index in range(count):
        handle = entry_handle(look64(leaf + (first + index) % LEAF_BLOCKS))
        if handle < high:
            prefetch(pool.store.cells.cell(handle))


cdef bint _replace(
    PoolCore pool, Blocks disk, Kit* kit, uint64_t* place, uint64_t block, const Prepared* new, Gain* gain
) noexcept nogil:
    """Store one block. False: something is not as usual, and nothing changed."""
    cdef Old old
    cdef uint64_t entry
    cdef uint32_t handle
    cdef bint is_same = new.kind == KIND_FILL
    cdef bint counts
    if new.handle or not _see(pool, look64(place), block, &old):
        return False
    counts = not old.stored and look64(&disk.quota) != 0
    if counts and not _count_one(disk):
        return False
    entry = same_entry(pool.seed, block, new.word) if is_same else 0
    if not is_same:
        handle = _put(pool, kit, new)
        if handle:
            entry = aged(entry_word(pool.seed, block, handle, new.word), pool.now)
    if entry == 0:
        if counts:
            subtract64(&disk.stored, 1)
        return False
    publish64(place, entry)
    gain.stored += 1 - <int64_t>old.stored
    gain.same += <int64_t>is_same - <int64_t>old.same
    gain.counted += counts
    if old.handle:
        _release(pool, kit, old.handle, old.word)
    return True


cdef bint _clear(PoolCore pool, Kit* kit, uint64_t* place, uint64_t block, Gain* gain) noexcept nogil:
    """Make one block a hole. False: something is not as usual, and nothing changed."""
    cdef Old old
    if not _see(pool, look64(place), block, &old):
        return False
    if old.stored:
        publish64(place, hole_word(pool.seed, block))
        gain.stored -= 1
        gain.same -= old.same
        if old.handle:
            _release(pool, kit, old.handle, old.word)
    return True


cdef bint _count_one(Blocks disk) noexcept nogil:
    """Count a block more, if the export's quota has room for it."""
    cdef uint64_t stored = look64(&disk.stored)
    while stored < look64(&disk.quota):
        if exchange64(&disk.stored, stored, stored + 1):
            return True
        stored = look64(&disk.stored)
    return False


cdef bint _see(PoolCore pool, uint64_t entry, uint64_t block, Old* old) noexcept nogil:
    """Find out what a block was. False: it is not right, or cannot be released beside others."""
    cdef Cell* cell
    old.handle = entry_handle(entry)
    old.same = entry & 1
    old.stored = old.same or old.handle
    old.word = 0
    if old.same:
        return entry == same_entry(pool.seed, block, repeated_of(entry))
    if old.handle == 0:
        return aged(entry, 0) == hole_word(pool.seed, block)
    if old.handle >= look32(&pool.store.cells.high):
        return False
    cell = pool.store.cells.cell(old.handle)
    old.word = look64(&cell.word)
    return (CODEC_RAW <= kind_of(old.word) < CODEC_ZSTD_DICT + CODEC_DICTS
            and old.word >> REFS_SHIFT != REFS_MAX
            and can_lie(pool.store.slab, unit_of(old.word), slot_of(old.word), length_of(old.word))
            and aged(entry, 0) == entry_word(pool.seed, block, old.handle, cell.fingerprint))


cdef uint32_t _put(PoolCore pool, Kit* kit, const Prepared* new) noexcept nogil:
    """Store a new object with one holder. Its handle, or 0: there is nothing at hand for it; nothing changed then."""
    cdef int size_class = pool.store.slab.class_of[new.length]
    cdef uint32_t handle
    cdef uint64_t item
    cdef Cell* cell
    if not has_handle(kit, pool.store) or not has_slot(kit, pool.store, size_class):
        return 0
    kit.handle_count -= 1
    handle = kit.handles[kit.handle_count]
    kit.slot_count[size_class] -= 1
    kit.bytes -= pool.store.slab.classes[size_class].size
    item = kit.slots[size_class][kit.slot_count[size_class]]
    expect_slot(kit, pool.store, size_class)
    memcpy(pool.arena.base + pool.store.slab.offset_of(retired_unit(item), retired_slot(item), new.length),
           new.source, new.length)
    cell = pool.store.cells.cell(handle)
    must_debug(cell.word == 0, b"a handle at hand is no object's")
    must(not pool.store.slab.is_emptied(size_class, retired_unit(item)),
         b"nothing is stored in what compaction empties")
    cell.fingerprint = new.word
    publish64(&cell.word, object_word(new.kind, new.length, retired_slot(item), retired_unit(item))
              | <uint64_t>1 << REFS_SHIFT)
    if pool.store.index.insert_beside(handle, new.word):
        kit.tallies.linked += 1
    else:
        kit.tallies.pending += 1
    kit.tallies.live += 1
    kit.tallies.huge_ever += new.kind == CODEC_RAW
    _tally(kit, cell.word, 1)
    return handle


cdef void _release(PoolCore pool, Kit* kit, uint32_t handle, uint64_t word) noexcept nogil:
    """One holder less; an object that nothing leads to any more goes."""
    cdef Cell* cell = pool.store.cells.cell(handle)
    cdef uint64_t refs = word >> REFS_SHIFT
    must_debug(refs != 0, b"an entry's object has a holder")
    if refs > 1:
        refs = subtract64(&cell.word, <uint64_t>1 << REFS_SHIFT) >> REFS_SHIFT
    if refs > 1:
        kit.tallies.shared_bytes -= length_of(word)
        kit.tallies.shared_objects -= refs == 2
        return
    if pool.store.index.remove_beside(handle, cell.fingerprint):
        kit.tallies.linked -= 1
    else:
        kit.tallies.pending -= 1
    if pool.store.was_tried(handle):
        pool.store.forget_tried(handle)
        if kind_of(word) == CODEC_LZ4:
            kit.tallies.tried_bytes -= length_of(word)
    publish64(&cell.word, 0)
    kit.tallies.live -= 1
    kit.tallies.freed_ever += 1
    _tally(kit, word, -1)
    let_go(kit, pool.store, retired_word(unit_of(word), slot_of(word), RELEASED), handle,
           pool.store.slab.class_of[length_of(word)])


cdef void _tally(Kit* kit, uint64_t word, int sign) noexcept nogil:
    """Add an object to the counters, or take it out (ObjectStore._count)."""
    kit.tallies.objects += <int64_t>sign
    kit.tallies.bytes_of[kind_of(word)] += <int64_t>sign * <int64_t>length_of(word)
    if kind_of(word) == CODEC_RAW:
        kit.tallies.huge_now += <int64_t>sign


cdef void _count(PoolCore pool, Blocks disk, const Gain* gain) noexcept nogil:
    """So many blocks more in the export, and in the sums that it is part of (Blocks._add). No recount is under way."""
    add64(&disk.stored, gain.stored - gain.counted)
    add64(&disk.same, gain.same)
    if disk.concealed:
        return
    add64(&pool.blocks_stored, gain.stored)
    add64(&pool.blocks_same, gain.same)
    if disk.summed == pool.sum:
        add64(&pool.sum_stored, gain.stored)
        add64(&pool.sum_same, gain.same)
