"""The block table of a deleted export goes: node by node, whatever it names, in bounded holds of the pool's lock.

Nobody else leads to what is dropped here: the export is gone (Blocks._retire) before it begins. A node that clones name
too is left to them. Each entry is a hole before what it held is released, so that a kill in between leaves a table that
opening drops again.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.lock cimport HOLD, HOLD_FREED, HOLD_PAGES, LOOKS, Lock, lock_leave, lock_take_behind
from nbdzram.engine.publish cimport look64, publish64
from nbdzram.engine.reclaim cimport keep_short, may_retire, reclaim
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport BRANCH_CHILDREN, BRANCH_SHIFT, TOP_LEVEL, Tables, hole_word, is_hole, page_of
from nbdzram.engine.users cimport Users, users_leaving


cdef bint drop_tree(
    Lock* lock, Users* users, ObjectStore store, Tables tables, uint64_t* place, int level, uint64_t number,
    uint32_t* left
) noexcept nogil:
    """Forget what a word of `level` names, that only a dead export leads to. Holds the lock, and lets it go when what
    is `left` of a hold is used up. False when the pool closes meanwhile: then opening finishes it."""
    cdef uint64_t first = number << BRANCH_SHIFT if level <= TOP_LEVEL else 0
    cdef uint64_t* words
    cdef uint32_t handle
    cdef int index
    cdef uint64_t pages
    if not _still(lock, users, store, tables, left, LOOKS // HOLD):
        return False
    if tables.drop_share(place, level, number):
        return True
    words = tables.words(page_of(place[0]))
    for index in range(BRANCH_CHILDREN):
        if not _still(lock, users, store, tables, left, 1):
            return False
        if level > 1:
            if page_of(words[index]) and not drop_tree(
                    lock, users, store, tables, words + index, level - 1, first + index, left):
                return False
        elif not is_hole(look64(words + index)):
            if not _still(lock, users, store, tables, left, LOOKS // HOLD_FREED):
                return False
            handle = tables.handle_at(look64(words + index), first + index)
            publish64(words + index, hole_word(tables.seed, first + index))
            if handle:
                pages = store.slab.pages_used
                store.release(handle)
                if store.slab.pages_used < pages and not _still(lock, users, store, tables, left, LOOKS // HOLD_PAGES):
                    return False
    tables.give_node(place, level, number)
    return True


cdef bint _still(
    Lock* lock, Users* users, ObjectStore store, Tables tables, uint32_t* left, uint32_t cost
) noexcept nogil:
    """Let the lock go for a moment when a hold has cost enough, and take it behind clients: a large disk takes
    thousands of holds. Whether the pool is still open."""
    if left[0] < cost:
        lock_leave(lock)
        keep_short(lock, store, tables)
        lock_take_behind(lock)
        while not may_retire(store, tables):
            lock_leave(lock)
            reclaim(lock, store, tables)
            lock_take_behind(lock)
        left[0] = LOOKS
    left[0] -= cost
    return not users_leaving(users)
