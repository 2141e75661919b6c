"""The one walk over the leaves of a block table, with the bound on a hold of the pool's lock built in.

    hold   go_on: nodes are passed over that name nothing, up to LOOKS words of them
           next_entry: up to HOLD entries of the leaf that was found, and no more whatever its caller does
    let go, come again, until cursor.next is cursor.end

With an origin, another table, the walk is over what is not as it is there: where both name the same node, which is
most of two copies' trees, nothing below is looked at. Without one the origin is a table that names nothing, so that
holes are passed over; it is the same walk.

Invariants
1. The number of a block is all that a walk remembers from one hold to the next: between two holds any node may have
   been changed, freed, or be another's. `leaf` and `origin` are good for the hold in which go_on gave them.
2. Every block from where the walk began to cursor.next was told, or is a hole (as it is in the origin).
3. A hold ends: what it may look at, and what it passed over, is entered in the lock (lock_saw), where tests read it.

A word that is not right leads nowhere: its blocks are told as entries of which none is right (Tables.no_leaf). In the
origin it hides what differs, so that all blocks below are told: a copy that rots is no base of anything any more, and
costs what was written since nothing.

Who walks otherwise, and must
    opening, upgrade, salvage   nothing of the arena is believed yet, and nobody else is in the pool
    check, recount              by the numbers of pages, not from a root: no clone or deletion carries a node past them,
                                and they share no code with what they check
    drop                        the export is gone and its tree one thread's: it frees what it passed, so it comes back
                                up, and pays for what each entry lets go instead of for each entry
    leaf, disk                  one leaf, whose stripe they hold: they change entries
    reading, foresight          one block, without a lock
    Tables.age_on               all leaves of all exports, by the numbers of pages
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.lock cimport HOLD, LOOKS, Lock, lock_saw
from nbdzram.engine.must cimport must
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, MAX_BLOCKS_SHIFT, TOP_LEVEL, Tables, branch_word, page_of,
)


cdef bint go_on(Lock* lock, Tables tables, uint64_t* root, uint64_t* origin, Cursor* cursor) noexcept nogil:
    """Under the pool's lock: find the next entries to look at, from cursor.next on, which moves to the first of them.

    False: there is none in this hold. Then cursor.next is cursor.end, or the caller lets the lock go and comes again. A
    root of NULL has none.
    """
    cdef uint32_t passed = 0, page, other
    cdef int level = TOP_LEVEL + 1
    cdef bint lost = False  # what the origin is below: one of its words is not right
    cdef uint64_t* now = root
    cdef uint64_t* before = origin
    must(cursor.end <= <uint64_t>1 << MAX_BLOCKS_SHIFT, b"a table ends where its numbers do")
    cursor.seed = tables.seed
    cursor.leaf = cursor.origin = NULL
    if root == NULL:
        cursor.next = cursor.end
    while cursor.next < cursor.end and passed < LOOKS:
        if not _is_right(tables, root, now, level, cursor.next):
            cursor.leaf = tables.no_leaf
            break
        lost = lost or not _is_right(tables, origin, before, level, cursor.next)
        page = page_of(now[0]) if now != NULL else 0
        other = page_of(before[0]) if before != NULL and not lost else 0
        if (lost or page != other) and level == 1:
            cursor.leaf = tables.words(page) if page else NULL
            cursor.origin = tables.words(other) if other else NULL
            if lost:
                cursor.origin = tables.no_leaf
            break
        if lost or page != other:
            level -= 1
            now = _below(tables, page, level, cursor.next)
            before = _below(tables, other, level, cursor.next)
            continue
        if level > TOP_LEVEL:
            cursor.next = cursor.end
            break
        passed += 1
        cursor.next = ((cursor.next >> (level * BRANCH_SHIFT)) + 1) << (level * BRANCH_SHIFT)
        now = now + 1 if now != NULL else NULL
        before = before + 1 if before != NULL else NULL
        if (cursor.next >> (level * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1) == 0:  # into what lies beside the node
            now, before, level = root, origin, TOP_LEVEL + 1
    cursor.next = cursor.stop = min(cursor.next, cursor.end)
    if cursor.leaf != NULL or cursor.origin != NULL:
        cursor.stop = min(cursor.next + HOLD, leaf_end(cursor))
    lock_saw(lock, cursor.stop - cursor.next, passed)
    return cursor.next < cursor.stop


cdef inline bint _is_right(
    Tables tables, uint64_t* root, const uint64_t* place, int level, uint64_t block
) noexcept nogil:
    """Whether the word on the way from a root to a block is what was written there. Where there is no word, it is."""
    cdef uint64_t number
    if place == NULL:
        return True
    number = block >> (level * BRANCH_SHIFT) if level <= TOP_LEVEL else tables.export_of(root)
    return place[0] == branch_word(tables.seed, level, number, page_of(place[0]))


cdef inline uint64_t* _below(Tables tables, uint32_t page, int level, uint64_t block) noexcept nogil:
    """The word of a node of `level` that leads to a block; NULL: there is no node, and nothing below it."""
    if page == 0:
        return NULL
    return tables.words(page) + ((block >> (level * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1))
