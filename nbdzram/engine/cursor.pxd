from libc.stdint cimport uint64_t

from nbdzram.engine.lock cimport Lock
from nbdzram.engine.publish cimport look64
from nbdzram.engine.table cimport LEAF_BLOCKS, Tables, hole_word

cdef struct Cursor:
    uint64_t next     # the block at which it goes on
    uint64_t end      # behind the last of the walk
    uint64_t stop     # behind the last that may be looked at under this hold
    uint64_t* leaf    # that they are entries of; NULL: they are holes
    uint64_t* origin  # the same of the other table
    uint64_t seed     # of the tables' checks

cdef inline uint64_t entry_now(const Cursor* cursor, uint64_t block) noexcept nogil:
    """What the table says of a block that next_entry told; it can change only beside those who write beside it."""
    return (look64(cursor.leaf + block % LEAF_BLOCKS) if cursor.leaf != NULL
            else hole_word(cursor.seed, block))

cdef inline bint next_entry(Cursor* cursor, uint64_t* block, uint64_t* entry) noexcept nogil:
    """Under the hold in which go_on said True: a block, and what the table says of it. False when the hold has looked
    at enough."""
    if cursor.next >= cursor.stop:
        return False
    block[0] = cursor.next
    entry[0] = entry_now(cursor, block[0])
    cursor.next += 1
    return True

cdef inline uint64_t origin_entry(const Cursor* cursor, uint64_t block) noexcept nogil:
    """What the other table says of a block that next_entry told."""
    return (look64(cursor.origin + block % LEAF_BLOCKS) if cursor.origin != NULL
            else hole_word(cursor.seed, block))

cdef inline uint64_t leaf_end(const Cursor* cursor) noexcept nogil:
    """Behind the last block of the walk in the leaf at which it stands."""
    return min(cursor.end, (cursor.next | (LEAF_BLOCKS - 1)) + 1)

cdef bint go_on(Lock* lock, Tables tables, uint64_t* root, uint64_t* origin, Cursor* cursor) noexcept nogil
