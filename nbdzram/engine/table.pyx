"""Block tables: which object a block of an export is, shared between clones until one of them writes.

    root (level 3) -> branch (2) -> branch (1) -> leaf (0)
    1024 children     1024          1024          512 entries: 2 MiB of the export

A node is one page of the arena; a branch holds page numbers, 0 for a subtree of holes. An export that was never
written has no node at all. A leaf's entry is one word:

    0                                       hole
    | same-filled word, 63 bits signed | 1 | every 8 bytes of the block are this word
    | handle 63..32 | age 31..1        | 0 | an object, or a repeated word that does not fit 63 bits; age in seconds

A clone takes the root of its source. A node with several parents is copied by the first write below it, and what a
copy points at gets one holder more: so a clone costs nothing at first and 4 KiB for 2 MiB written later.

Invariants
1. refs of a node counts the places that name it (parents and export directory); only a node with one is ever changed.
2. A node is filled before its number is published by one store in its parent.
3. A free node's page is not resident.
4. A node that names nothing is freed by whoever took its last name away (prune); a kill may leave some.

Not locked here: the pool's lock covers every call.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from nbdzram.engine.arena cimport (
    PAGE_SIZE, UNIT_PAGES, Arena, Region, region_ensure, region_free, region_reserve,
)
from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, kind_of, target_of
from nbdzram.engine.lock cimport LOOKS
from nbdzram.engine.must cimport must, must_debug
from nbdzram.engine.publish cimport publish32
from nbdzram.engine.store cimport ObjectStore

from nbdzram.errors import ArenaError


@cython.final
cdef class Tables:
    """The block tables of one arena."""

    def __cinit__(self, ObjectStore store):
        self.store = store
        self.arena = store.arena
        cdef uint64_t pages = self.arena.reserved // PAGE_SIZE
        if not region_reserve(&self.refs, pages * 4) or not region_reserve(&self.free_nodes, pages * 4):
            raise ArenaError("cannot reserve addresses for block tables; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.refs)
        region_free(&self.free_nodes)

    cdef uint32_t* branch(self, uint32_t page) noexcept nogil:
        return <uint32_t*>(self.arena.base + <uint64_t>page * PAGE_SIZE)

    cdef uint64_t* entries(self, uint32_t page) noexcept nogil:
        return <uint64_t*>(self.arena.base + <uint64_t>page * PAGE_SIZE)

    cdef uint32_t* node(self, uint32_t page) noexcept nogil:
        """A node's level and count of parents."""
        return <uint32_t*>self.refs.base + page

    cdef uint64_t page_end(self) noexcept nogil:
        """Behind the last page that can be a node."""
        return min(<uint64_t>self.arena.unit_high * UNIT_PAGES, self.refs.committed // 4)

    cdef uint32_t parents(self, uint32_t page) noexcept nogil:
        return self.node(page)[0] & PARENTS_MASK

    cdef void _changes(self, uint32_t page) noexcept nogil:
        """Tell a check that a node is about to come, to go, or to have more parents or fewer."""
        if self.census is not None:
            self.census.change(page)

    # -- finding -------------------------------------------------------------------------------------------------

    cdef uint64_t* leaf(self, uint32_t root, uint64_t block) noexcept nogil:
        """The 512 entries among which `block` is, or NULL where all are holes."""
        cdef int level
        cdef uint32_t page = root
        for level in range(TOP_LEVEL, 0, -1):
            if page == 0:
                return NULL
            page = self.branch(page)[(block >> (LEAF_SHIFT + (level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1)]
        return self.entries(page) if page else NULL

    cdef uint64_t* next_leaf(self, uint32_t root, uint64_t* block, uint64_t end) noexcept nogil:
        """The entries of the first leaf from block[0] on, which moves to its first block there. NULL: none before `end`,
        where block[0] is then, or LOOKS children were passed over, and the caller lets the lock go before it calls again.
        """
        cdef uint32_t looks = LOOKS
        cdef uint32_t page = root
        cdef uint32_t index
        cdef int level = TOP_LEVEL
        cdef int shift
        must(end <= <uint64_t>1 << MAX_BLOCKS_SHIFT, b"a table ends where its numbers do")
        while page and level and block[0] < end:
            shift = LEAF_SHIFT + (level - 1) * BRANCH_SHIFT
            index = (block[0] >> shift) & (BRANCH_CHILDREN - 1)
            while index < BRANCH_CHILDREN and self.branch(page)[index] == 0 and looks:
                index += 1
                looks -= 1
                block[0] = ((block[0] >> shift) + 1) << shift
            if looks == 0:
                return NULL
            if index < BRANCH_CHILDREN:
                page = self.branch(page)[index]
                level -= 1
            else:  # into what lies beside the branch
                page = root
                level = TOP_LEVEL
        if page and block[0] < end:
            return self.entries(page)
        block[0] = end
        return NULL

    cdef bint leaf_is_shared(self, uint32_t root, uint64_t block) noexcept nogil:
        """Whether a node on the way to the block's leaf, or the leaf, has several parents."""
        cdef int level
        cdef uint32_t page = root
        for level in range(TOP_LEVEL, -1, -1):
            if page == 0:
                return False
            if self.parents(page) > 1:
                return True
            if level:
                page = self.branch(page)[(block >> (LEAF_SHIFT + (level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1)]
        return False

    # -- changing ------------------------------------------------------------------------------------------------

    cdef uint32_t _take(self, int level) noexcept nogil:
        """A page of zeroes with one parent, 0 when there is no room."""
        cdef uint32_t unit, page
        cdef int index
        if self.free_count == 0:
            unit = self.arena.take()
            if unit == 0:
                return 0
            if (not region_ensure(&self.free_nodes, UNIT_PAGES * 4)
                    or not region_ensure(&self.refs, (<uint64_t>unit + 1) * UNIT_PAGES * 4)):
                self.arena.give(unit)
                return 0
            for index in range(UNIT_PAGES):
                (<uint32_t*>self.free_nodes.base)[index] = unit * UNIT_PAGES + UNIT_PAGES - 1 - index
            self.free_count = UNIT_PAGES
        page = (<uint32_t*>self.free_nodes.base)[self.free_count - 1]
        if not self.arena.commit(<uint64_t>page * PAGE_SIZE, PAGE_SIZE):
            return 0
        self.free_count -= 1
        self.nodes += 1
        self._changes(page)
        self.node(page)[0] = 1 | <uint32_t>level << LEVEL_SHIFT
        return page

    cdef void give_node(self, uint32_t* place) noexcept nogil:
        """Free the node that `place` alone names and that names nothing any more."""
        cdef uint32_t page = place[0]
        must(self.parents(page) == 1, b"a node is freed by the last that names it")
        must_debug(self._is_empty(page), b"a node that is freed names nothing")
        publish32(place, 0)
        self._changes(page)
        self.node(page)[0] = 0
        self.nodes -= 1
        self.arena.release(<uint64_t>page * PAGE_SIZE, PAGE_SIZE)
        if region_ensure(&self.free_nodes, (<uint64_t>self.free_count + 1) * 4):
            (<uint32_t*>self.free_nodes.base)[self.free_count] = page
            self.free_count += 1

    cdef void prune(self, uint32_t* root, uint64_t block) noexcept nogil:
        """Free the nodes on the way to a block that name nothing, from the lowest up, as far as this table alone has them."""
        cdef uint32_t* places[TOP_LEVEL + 1]
        cdef uint32_t* place = root
        cdef int level = TOP_LEVEL
        while True:
            if place[0] == 0:
                break
            if self.parents(place[0]) > 1:
                return
            places[level] = place
            level -= 1
            if level < 0:
                break
            place = self.branch(place[0]) + ((block >> (LEAF_SHIFT + level * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1))
        for level in range(level + 1, TOP_LEVEL + 1):
            if not self._is_empty(places[level][0]):
                return
            self.give_node(places[level])

    cdef bint _is_empty(self, uint32_t page) noexcept nogil:
        """Whether a node names nothing: half a microsecond at most."""
        cdef uint64_t* words = self.entries(page)
        cdef int index
        for index in range(LEAF_BLOCKS):
            if words[index]:
                return False
        return True

    cdef void acquire(self, uint32_t page) noexcept nogil:
        """One parent more."""
        if page:
            self._changes(page)
            self.node(page)[0] += 1

    cdef bint drop_share(self, uint32_t* place) noexcept nogil:
        """Forget a node that others name too, or none. False when `place` is the only one to name it."""
        cdef uint32_t page = place[0]
        if page and self.parents(page) == 1:
            return False
        publish32(place, 0)
        if page:
            self._changes(page)
            self.node(page)[0] -= 1
        return True

    cdef bint _own(self, uint32_t* place, int level) noexcept nogil:
        """Make the node at `place` exist and be named by it alone. False when there is no room."""
        cdef uint32_t old = place[0]
        cdef uint32_t fresh
        cdef int index
        if old and self.parents(old) == 1:
            return True
        fresh = self._take(level)
        if fresh == 0:
            return False
        if old:
            memcpy(self.entries(fresh), self.entries(old), PAGE_SIZE)
            if level:
                for index in range(BRANCH_CHILDREN):
                    self.acquire(self.branch(fresh)[index])
            else:
                for index in range(LEAF_BLOCKS):
                    if entry_handle(self.entries(fresh)[index]):
                        self.store.acquire(entry_handle(self.entries(fresh)[index]))
            self._changes(old)
            self.node(old)[0] -= 1
        publish32(place, fresh)
        return True

    cdef uint32_t* place_of(self, uint32_t* root, uint64_t block) noexcept nogil:
        """Where the block's leaf is named, every branch above owned. NULL when there is no room."""
        cdef int level
        cdef uint32_t* place = root
        for level in range(TOP_LEVEL, 0, -1):
            if not self._own(place, level):
                return NULL
            place = self.branch(place[0]) + (
                (block >> (LEAF_SHIFT + (level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1)
            )
        return place

    cdef uint64_t* leaf_for_write(self, uint32_t* root, uint64_t block) noexcept nogil:
        """The 512 entries among which `block` is, to change. NULL when there is no room; nothing is lost then."""
        cdef uint32_t* place = self.place_of(root, block)
        if place == NULL or not self._own(place, 0):
            return NULL
        return self.entries(place[0])

    # -- counting, and opening an arena again --------------------------------------------------------------------

    cdef bint is_same(self, uint64_t entry) noexcept nogil:
        """Whether an entry is a same-filled block."""
        cdef uint32_t handle = entry_handle(entry)
        return entry != 0 and (handle == 0 or kind_of(self.store.cells.cell(handle).word) == KIND_FILL)

    cdef void count(self, uint32_t page, int level, uint64_t* stored, uint64_t* same) noexcept nogil:
        """Add up the blocks stored, and the same-filled among them, below a node."""
        cdef int index
        cdef uint64_t entry
        if page == 0:
            return
        if level:
            for index in range(BRANCH_CHILDREN):
                self.count(self.branch(page)[index], level - 1, stored, same)
            return
        for index in range(LEAF_BLOCKS):
            entry = self.entries(page)[index]
            stored[0] += entry != 0
            same[0] += self.is_same(entry)

    cdef bint adopt(self, uint32_t page, int level) noexcept nogil:
        """Count the parents of every node below and the holders of every handle. False: a broken arena."""
        cdef int index
        cdef uint32_t handle
        cdef uint64_t word
        cdef uint32_t steps
        if page == 0:
            return True
        if page // UNIT_PAGES >= self.arena.unit_high:
            return False
        if not region_ensure(&self.refs, (<uint64_t>(page // UNIT_PAGES) + 1) * UNIT_PAGES * 4):
            return False
        if self.parents(page):
            self.node(page)[0] += 1
            return self.node(page)[0] >> LEVEL_SHIFT == <uint32_t>level
        self.node(page)[0] = 1 | <uint32_t>level << LEVEL_SHIFT
        self.nodes += 1
        if level:
            for index in range(BRANCH_CHILDREN):
                if not self.adopt(self.branch(page)[index], level - 1):
                    return False
            return True
        for index in range(LEAF_BLOCKS):
            handle = entry_handle(self.entries(page)[index])
            steps = 0
            while handle:
                if handle >= self.store.cells.high:
                    return False
                word = self.store.cells.cell(handle).word
                if kind_of(word) == 0 or steps > 4096:
                    return False
                self.store.cells.add_refs(handle, 1)
                handle = target_of(word) if kind_of(word) == KIND_FORWARD else 0
                steps += 1
        return True

    cdef bint adopt_unit(self, uint32_t unit) noexcept nogil:
        """Whether the unit holds nodes; its other pages are free nodes then."""
        cdef int index
        cdef uint32_t page
        cdef bint found = False
        if (<uint64_t>unit + 1) * UNIT_PAGES * 4 > self.refs.committed:
            return False
        for index in range(UNIT_PAGES):
            if self.parents(unit * UNIT_PAGES + index):
                found = True
        if not found:
            return False
        for index in range(UNIT_PAGES):
            page = unit * UNIT_PAGES + index
            if self.parents(page) == 0:
                self.arena.release(<uint64_t>page * PAGE_SIZE, PAGE_SIZE)
                if region_ensure(&self.free_nodes, (<uint64_t>self.free_count + 1) * 4):
                    (<uint32_t*>self.free_nodes.base)[self.free_count] = page
                    self.free_count += 1
        return True

    cdef uint64_t metadata(self) noexcept nogil:
        """Resident bytes of nodes and of the counts of their parents."""
        return self.nodes * PAGE_SIZE + self.nodes * 4
