"""A leaf that a clone shares, or that is not there yet, before it is written or trimmed: what takes more than one hold
of the pool's lock.

own    copy it, HOLD entries a hold, and name the copy in a hold of its own   (table.pyx, LeafCopy); make the first one
       between two holds
drop   count its blocks, HOLD a hold, and forget it: none of its objects is touched

Invariant: the caller holds the leaf's stripe throughout, so nobody else changes what the export has there. Whether
there is an export, how large it is and who else has the leaf is asked again under each hold.

The caller holds the pool's lock as well, before and after; it is let go in between.
"""

from libc.errno cimport EINVAL, EIO, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.lock cimport HOLD, lock_leave, lock_take
from nbdzram.engine.must cimport must
from nbdzram.engine.publish cimport look64
from nbdzram.engine.table cimport LEAF_BLOCKS, LEAF_SHIFT, LeafCopy, is_hole, page_of

cdef enum:
    WORD_BITS = 64
    KIND_WORDS = 8  # a bit a block of a leaf

assert KIND_WORDS * WORD_BITS == LEAF_BLOCKS

cdef struct Kinds:
    # Of the blocks of a leaf, a bit a block.
    uint64_t stored[KIND_WORDS]
    uint64_t same[KIND_WORDS]


cdef uint64_t* own_leaf(Blocks disk, uint64_t block, uint64_t end, bint making_room, int* error) noexcept nogil:
    """The 512 entries among which `block` is, to change; a write that ends at `end` (in bytes) is about to.

    NULL and an error: the export is gone or too small, there is no room, or nobody knows the leaf any more.
    """
    cdef LeafCopy copy
    cdef uint64_t* leaf
    cdef uint64_t* root
    cdef uint32_t shift = disk.pool.shift
    cdef bint in_hand = False
    copy.page = 0
    copy.refused = False
    while True:
        leaf = NULL
        root = disk.root()
        error[0] = EIO if root == NULL else EINVAL if end > disk.size else 0
        if error[0]:
            copy.goes_on = disk.pool.tables.forget_copy_on(&copy)
        else:
            disk.pool.arena.ledger.making_room = making_room
            leaf = disk.pool.tables.own_leaf_on(root, block, &copy)
            disk.pool.arena.ledger.making_room = False
        if not copy.goes_on:
            break
        # A check that counts the copy among the nodes finds nobody who names it: it waits until it is named, or gone.
        if not in_hand:
            disk.pool.in_hand[shift] = disk.pool.in_hand[shift] + 1
            in_hand = True
        lock_leave(&disk.pool.lock)
        disk.pool.tables.fill_copy(&copy)
        lock_take(&disk.pool.lock)
    must(copy.page == 0, b"a copy of a leaf is named or freed by whoever made it")
    if in_hand:
        disk.pool.in_hand[shift] = disk.pool.in_hand[shift] - 1
    if leaf == NULL and error[0] == 0:
        error[0] = EIO if disk.pool.tables.is_lost(root, block) else ENOSPC
        disk.pool.tables.prune(root, block)
    return leaf


cdef bint drop_shared_leaf(Blocks disk, uint64_t first) noexcept nogil:
    """Forget the leaf of which `first` is the first block. False: it is the export's alone, or there is no room to say
    so."""
    cdef Kinds kinds
    cdef uint64_t* place
    cdef uint64_t bit
    cdef uint32_t index
    memset(&kinds, 0, sizeof(kinds))
    for index in range(LEAF_BLOCKS // HOLD):
        if not _count_on(disk, first, index * HOLD, &kinds):
            return False
        lock_leave(&disk.pool.lock)
        lock_take(&disk.pool.lock)
    if disk.root() == NULL or not disk.pool.tables.leaf_is_shared(disk.root(), first):
        return False
    disk.pool.arena.ledger.making_room = True
    place = disk.pool.tables.place_of(disk.root(), first)
    disk.pool.arena.ledger.making_room = False
    if place == NULL or page_of(place[0]) == 0 or not disk.pool.tables.drop_share(place, 1, first >> LEAF_SHIFT):
        return False
    for index in range(LEAF_BLOCKS):
        bit = <uint64_t>1 << (index % WORD_BITS)
        if kinds.stored[index // WORD_BITS] & bit:
            disk._count(first + index, -1, -<int64_t>(kinds.same[index // WORD_BITS] & bit != 0))
    disk.pool.tables.prune(disk.root(), first)
    return True


cdef bint _count_on(Blocks disk, uint64_t first, uint32_t start, Kinds* kinds) noexcept nogil:
    """Find out what HOLD blocks are. False: the leaf is not shared, or the export is gone."""
    cdef uint64_t* leaf
    cdef uint64_t bit, entry
    cdef uint32_t index
    if disk.root() == NULL or not disk.pool.tables.leaf_is_shared(disk.root(), first):
        return False
    leaf = disk.pool.tables.leaf(disk.root(), first)
    for index in range(start, start + HOLD if leaf != NULL else start):
        bit = <uint64_t>1 << (index % WORD_BITS)
        entry = look64(leaf + index)  # readers make it younger
        if not is_hole(entry) and disk.pool.tables.is_right(entry, first + index):
            kinds.stored[index // WORD_BITS] |= bit
            kinds.same[index // WORD_BITS] |= bit if disk.pool.tables.is_same(entry) else 0
    return True
