"""Block tables: which object a block of an export is, shared between clones until one of them writes.

    root -> node (level 4) -> branch (3) -> branch (2) -> branch (1) -> leaf (0)
            8 children        512           512           512           512 entries: 2 MiB of the export

A node is one page of the arena, 512 words of which each carries its check (format.pyx says what a check is good for).

    branch  | page 63..32 | check 31..0                             page 0: a subtree of holes
    leaf    | 0           | 0           | check 16..1 | 0           a hole
            | number 63..18 | 0 | check 16..1 | 1                   every 8 bytes are this number of 46 bits, signed
            | pattern 49..18 | 1 | check 16..1 | 1                  every 4 bytes are this pattern
            | handle 63..32 | age 31..17 | check 16..1 | 0          an object, or any other repeated word (a fill)

A check binds its word to the pool and to its place in the tree, an entry's also to the content (by the fingerprint of
its cell). So a word that was cleared, changed, or copied from elsewhere is seen wherever it is used. Clones share nodes
at the same place, so what they share is right for all of them. An export that was never written has no node at all.

A clone takes the root of its source. A node with several parents is copied by the first write below it, and what a
copy points at gets one holder more: so a clone costs nothing at first and 4 KiB for 2 MiB written later. A branch is
copied at once, as its 512 children are looked at in about 2 us; a leaf, whose cells lie anywhere, HOLD entries a hold
(LeafCopy), while its writer holds the stripe: what several have does not change, and only its writer can make the
table name another leaf there. So is a first leaf, whose holes are written with no lock but the stripe.

Invariants
1. refs of a node counts the places that name it (parents and export directory); only a node with one is ever changed.
2. A node is filled before its number is published by one store in its parent. Until then it has its one parent in
   advance, and is counted among those that a write has in hand (Pool.in_hand).
3. A free node's page reads as zeroes.
4. A node that names nothing is freed by whoever took its last name away (prune); a kill may leave some.
5. An entry that is not right holds nothing: no count knows of it. It is kept as it is until its block is written.
6. A node that nothing names any more is retired: its page keeps what it says until no reader can see it
   (quiescence.pyx), and counts as used. So who walks down finds nodes only, but perhaps one that the walk's export has
   left meanwhile, which is another's alone then, and changes with that: reading.pyx looks again whether it has.

Not locked here: the pool's lock covers every call; readers without it walk by themselves (reading.pyx).
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from nbdzram.engine.arena cimport region_ensure, region_free, region_reserve
from nbdzram.engine.cells cimport KIND_FILL, kind_of
from nbdzram.engine.format cimport EXPORTS_AT
from nbdzram.engine.ledger cimport ledger_give, ledger_take
from nbdzram.engine.limbo cimport (
    LIMBO_ROOM, limbo_count, limbo_due, limbo_has_room, limbo_one_less, limbo_one_more, limbo_ripen,
)
from nbdzram.engine.lock cimport HOLD, HOLD_PAGES
from nbdzram.engine.must cimport must, must_debug
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_PAGES
from nbdzram.engine.prefetch cimport prefetch
from nbdzram.engine.publish cimport (
    add32, add64, amend64, claim_bit, exchange32, exchange64, look8, look32, look64, publish64,
)
from nbdzram.engine.store cimport ObjectStore

from nbdzram.errors import ArenaError

cdef enum:
    ENTRY_SIZE = 512  # of an export directory entry, which a root stands in


@cython.final
cdef class Tables:
    """The block tables of one arena, whose words are checked with `seed`."""

    def __cinit__(self, ObjectStore store, uint64_t seed):
        self.store = store
        self.arena = store.arena
        self.seed = seed
        cdef uint64_t pages = self.arena.reserved // PAGE_SIZE
        if (not region_reserve(&self.refs, pages * 4, NULL)
                or not region_reserve(&self.refs_used, pages * 4 // PAGE_SIZE // 8 + 1, &self.arena.ledger)
                or not region_reserve(&self.free_nodes, pages * 4, &self.arena.ledger)
                or not region_ensure(&self.free_nodes, 1) or not region_ensure(&self.refs_used, 1)):
            raise ArenaError("cannot reserve addresses for block tables; raise ulimit -v")
        self.retired = <uint32_t*>malloc(LIMBO_ROOM * sizeof(uint32_t))
        if self.retired == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.retired)
        region_free(&self.refs)
        region_free(&self.refs_used)
        region_free(&self.free_nodes)

    cdef uint64_t* words(self, uint32_t page) noexcept nogil:
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

    cdef uint64_t export_of(self, uint64_t* root) noexcept nogil:
        """The number of the export whose root stands here: what a root's check is bound to."""
        return <uint64_t>(<char*>root - <char*>self.arena.base - EXPORTS_AT) // ENTRY_SIZE

    # -- finding -------------------------------------------------------------------------------------------------

    # The way to a block goes down from a root: `word` stands in level `level` as number `number` of it, and names a
    # node of the level below, in which the next word of the way stands. Who looks at many blocks walks with cursor.pyx.

    cdef uint64_t _number(self, uint64_t* root, int level, uint64_t block) noexcept nogil:
        return block >> (level * BRANCH_SHIFT) if level <= TOP_LEVEL else self.export_of(root)

    cdef bint is_word(self, uint64_t word, int level, uint64_t number) noexcept nogil:
        return word == branch_word(self.seed, level, number, page_of(word))

    cdef uint64_t* leaf(self, uint64_t* root, uint64_t block) noexcept nogil:
        """The 512 entries among which `block` is, or NULL where all are holes.

        Where a word on the way is not right, entries of which none is (no_leaf).
        """
        cdef int level
        cdef uint64_t* place = root
        cdef uint64_t number
        for level in range(TOP_LEVEL + 1, 0, -1):
            number = self._number(root, level, block)
            if not self.is_word(place[0], level, number):
                return self.no_leaf
            if page_of(place[0]) == 0:
                return NULL
            place = self.words(page_of(place[0]))
            if level > 1:
                place += (block >> ((level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1)
        return place

    cdef bint is_lost(self, uint64_t* root, uint64_t block) noexcept nogil:
        """Whether nobody can tell what the block is."""
        cdef uint64_t* leaf = self.leaf(root, block)
        return leaf == self.no_leaf

    cdef bint leaf_is_shared(self, uint64_t* root, uint64_t block) noexcept nogil:
        """Whether a node on the way to the block's leaf, or the leaf, has several parents."""
        cdef int level
        cdef uint64_t* place = root
        for level in range(TOP_LEVEL + 1, 0, -1):
            if page_of(place[0]) == 0 or not self.is_word(place[0], level, self._number(root, level, block)):
                return False
            if self.parents(page_of(place[0])) > 1:
                return True
            place = self.words(page_of(place[0])) + ((block >> ((level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1))
        return False

    cdef bint is_right(self, uint64_t entry, uint64_t block) noexcept nogil:
        """Whether an entry is what was stored for the block, as far as can be told."""
        cdef uint32_t handle = entry_handle(entry)
        cdef uint64_t fingerprint = 0
        if entry & 1:
            return entry == same_entry(self.seed, block, repeated_of(entry))
        if handle:
            if (handle >= look32(&self.store.cells.high)
                    or kind_of(look64(&self.store.cells.cell(handle).word)) == 0):
                return False
            fingerprint = self.store.cells.cell(handle).fingerprint
        return aged(entry, 0) == entry_word(self.seed, block, handle, fingerprint)

    cdef uint32_t handle_at(self, uint64_t entry, uint64_t block) noexcept nogil:
        """The handle that the entry of `block` holds; 0 if it holds none, or is not right."""
        return entry_handle(entry) if entry_handle(entry) and self.is_right(entry, block) else 0

    # -- changing ------------------------------------------------------------------------------------------------

    cdef bint reserve_refs(self, uint32_t unit) noexcept nogil:
        """Make the counts of a unit's nodes usable. Their page is that of 64 units; where none has nodes it is not
        resident."""
        cdef uint64_t page = <uint64_t>unit * UNIT_PAGES * 4 // PAGE_SIZE
        if (not region_ensure(&self.refs, (<uint64_t>unit + 1) * UNIT_PAGES * 4)
                or not region_ensure(&self.refs_used, page // 8 + 1)):
            return False
        if self.refs_used.base[page // 8] >> (page & 7) & 1:
            return True
        if not ledger_take(&self.arena.ledger, 1):
            return False
        self.refs_used.base[page // 8] |= 1 << (page & 7)
        self.refs_pages += 1
        return True

    cdef uint32_t _take(self, int level) noexcept nogil:
        """A page with one parent, 0 when there is no room."""
        cdef uint32_t unit, page
        cdef int index
        if self.free_count == 0 and limbo_count(&self.limbo):
            self.reclaim(HOLD_PAGES)
        if self.free_count == 0:
            unit = self.arena.take()
            if unit == 0:
                return 0
            # Room for all nodes to be free one day: giving one back must never fail.
            if (not region_ensure(&self.free_nodes, (self.nodes + limbo_count(&self.limbo) + UNIT_PAGES) * 4)
                    or not self.reserve_refs(unit)):
                self.arena.give(unit)
                return 0
            for index in range(UNIT_PAGES):
                (<uint32_t*>self.free_nodes.base)[index] = unit * UNIT_PAGES + UNIT_PAGES - 1 - index
            self.free_count = UNIT_PAGES
        page = (<uint32_t*>self.free_nodes.base)[self.free_count - 1]
        if not ledger_take(&self.arena.ledger, 1):
            return 0
        if not self.arena.commit(<uint64_t>page * PAGE_SIZE, PAGE_SIZE):
            ledger_give(&self.arena.ledger, 1)
            return 0
        self.free_count -= 1
        self.nodes += 1
        self._changes(page)
        self.node(page)[0] = 1 | <uint32_t>level << LEVEL_SHIFT
        return page

    cdef void give_node(self, uint64_t* place, int level, uint64_t number) noexcept nogil:
        """Retire the node that the word at `place` alone names and that names nothing any more."""
        cdef uint32_t page = page_of(place[0])
        must(self.parents(page) == 1, b"a node is freed by the last that names it")
        must_debug(self._names_nothing(page, level - 1), b"a node that is freed names nothing")
        publish64(place, branch_word(self.seed, level, number, 0))
        self._retire(page)

    cdef void _retire(self, uint32_t page) noexcept nogil:
        """Give up a node that no place names any more, or none named yet."""
        must(limbo_has_room(&self.limbo, 1), b"who retires nodes looks for room first (reclaim.pyx)")
        self._changes(page)
        self.node(page)[0] = 0
        self.nodes -= 1
        self.retired[self.limbo.last & (LIMBO_ROOM - 1)] = page
        limbo_one_more(&self.limbo)
        self.reclaim(limbo_due(&self.limbo))

    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil:
        """Free up to `limit` retired nodes that nobody sees any more; how many."""
        cdef uint64_t count = 0
        cdef uint32_t page
        while count < limit and (self.limbo.first < self.limbo.ripe or limbo_ripen(&self.limbo)):
            page = self.retired[self.limbo.first & (LIMBO_ROOM - 1)]
            limbo_one_less(&self.limbo)
            ledger_give(&self.arena.ledger, 1)
            self.arena.release(<uint64_t>page * PAGE_SIZE, PAGE_SIZE)
            (<uint32_t*>self.free_nodes.base)[self.free_count] = page
            self.free_count += 1
            count += 1
        return count

    cdef void prune(self, uint64_t* root, uint64_t block) noexcept nogil:
        """Free the nodes on the way to a block that name nothing, from the lowest up, as far as this table alone has
        them."""
        cdef uint64_t* places[TOP_LEVEL + 2]
        cdef uint64_t* place = root
        cdef int level = TOP_LEVEL + 1
        while level and page_of(place[0]):
            if (not self.is_word(place[0], level, self._number(root, level, block))
                    or self.parents(page_of(place[0])) > 1):
                return
            places[level] = place
            level -= 1
            place = self.words(page_of(place[0])) + ((block >> (level * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1))
        for level in range(level + 1, TOP_LEVEL + 2):
            if not self._is_empty(page_of(places[level][0]), level - 1, block):
                return
            self.give_node(places[level], level, self._number(root, level, block))

    cdef bint _is_empty(self, uint32_t page, int level, uint64_t block) noexcept nogil:
        """Whether a node of `level` over `block` says of all that there is nothing: a microsecond at most."""
        cdef uint64_t* words = self.words(page)
        cdef uint64_t first = block >> (level * BRANCH_SHIFT) & ~<uint64_t>(BRANCH_CHILDREN - 1)
        cdef uint64_t word
        cdef int index
        for index in range(BRANCH_CHILDREN):
            word = look64(words + index)
            if page_of(word) or word != (
                    branch_word(self.seed, level, first + index, 0) if level else hole_word(self.seed, first + index)):
                return False
        return True

    cdef bint _names_nothing(self, uint32_t page, int level) noexcept nogil:
        """Whether no word of a node leads anywhere. One that says so may be damaged all the same."""
        cdef uint64_t* words = self.words(page)
        cdef uint64_t word
        cdef int index
        for index in range(BRANCH_CHILDREN):
            word = look64(words + index)
            if entry_handle(word) if level == 0 else page_of(word):
                return False
        return True

    cdef void acquire(self, uint32_t page) noexcept nogil:
        """One parent more."""
        if page:
            self._changes(page)
            self.node(page)[0] += 1

    cdef void share(self, uint64_t* root, uint64_t* twin) noexcept nogil:
        """Let another export have the table of this one. A root that is not right is not right for its twin either."""
        cdef uint32_t page = page_of(root[0])
        if self.is_word(root[0], TOP_LEVEL + 1, self.export_of(root)):
            self.acquire(page)
            twin[0] = branch_word(self.seed, TOP_LEVEL + 1, self.export_of(twin), page)
        else:
            twin[0] = 0

    cdef bint drop_share(self, uint64_t* place, int level, uint64_t number) noexcept nogil:
        """Forget a node that others name too, or none, or nobody can tell. False when `place` is the only one to name
        it."""
        cdef uint32_t page = page_of(place[0])
        if not self.is_word(place[0], level, number):
            page = 0
        if page and self.parents(page) == 1:
            return False
        publish64(place, branch_word(self.seed, level, number, 0))
        if page:
            self._changes(page)
            self.node(page)[0] -= 1
        return True

    cdef bint _own(self, uint64_t* root, uint64_t* place, int level, uint64_t block) noexcept nogil:
        """Make the branch that the word at `place` names exist, and be named by it alone; a leaf takes several holds
        (LeafCopy). False: no room, or not right."""
        cdef uint64_t number = self._number(root, level, block)
        cdef uint32_t old = page_of(place[0])
        cdef uint32_t fresh
        if not self.is_word(place[0], level, number):
            return False
        if old and self.parents(old) == 1:
            return True
        must(level > 1, b"a leaf is copied a few entries at a time, or filled outside the lock")
        fresh = self._take(level - 1)
        if fresh == 0:
            return False
        if old:
            self._copy_branch(fresh, old, level - 1, block)
            self._changes(old)
            self.node(old)[0] -= 1
        else:
            self._clear(fresh, level - 1, block)
        publish64(place, branch_word(self.seed, level, number, fresh))
        return True

    cdef void _clear(self, uint32_t page, int level, uint64_t block) noexcept nogil:
        """Make a page, which nothing names yet, the node of `level` over `block`, with nothing below it."""
        cdef uint64_t* words = self.words(page)
        cdef uint64_t first = block >> (level * BRANCH_SHIFT) & ~<uint64_t>(BRANCH_CHILDREN - 1)
        cdef int index
        for index in range(BRANCH_CHILDREN):
            amend64(words + index, branch_word(self.seed, level, first + index, 0) if level
                    else hole_word(self.seed, first + index))

    cdef void _copy_branch(self, uint32_t page, uint32_t source, int level, uint64_t block) noexcept nogil:
        """Make a page the twin of a branch: its children have one parent more. What is not right stays so, and has
        none."""
        cdef uint64_t* words = self.words(page)
        cdef uint64_t first = block >> (level * BRANCH_SHIFT) & ~<uint64_t>(BRANCH_CHILDREN - 1)
        cdef int index
        memcpy(words, self.words(source), PAGE_SIZE)
        for index in range(BRANCH_CHILDREN):
            if self.is_word(words[index], level, first + index):
                self.acquire(page_of(words[index]))

    cdef uint64_t* place_of(self, uint64_t* root, uint64_t block) noexcept nogil:
        """The word of level 1 that names the block's leaf, every branch above owned. NULL: no room, or not right."""
        cdef int level
        cdef uint64_t* place = root
        for level in range(TOP_LEVEL + 1, 1, -1):
            if not self._own(root, place, level, block):
                return NULL
            place = self.words(page_of(place[0])) + ((block >> ((level - 1) * BRANCH_SHIFT)) & (BRANCH_CHILDREN - 1))
        return place

    cdef uint64_t* own_leaf_on(self, uint64_t* root, uint64_t block, LeafCopy* copy) noexcept nogil:
        """The 512 entries among which `block` is, to change, under its stripe.

        NULL: the leaf is being made, and the caller lets the lock go, and fills it (fill_copy), before it calls again
        (copy.goes_on); or there is no room, or the block is lost.
        """
        cdef uint64_t* place = self.place_of(root, block)
        cdef uint32_t old = page_of(place[0]) if place != NULL else 0
        cdef bint right = place != NULL and self.is_word(place[0], 1, block >> LEAF_SHIFT)
        cdef bint wanted = right and (old == 0 or self.parents(old) > 1)
        copy.goes_on = True
        if copy.page and (copy.refused or not wanted or copy.source != old):
            self.forget_copy_on(copy)  # or the others are gone, or there is no room for a branch any more
        elif wanted and copy.page == 0 and not copy.refused:
            copy.page = self._take(0)
            copy.source, copy.first, copy.done = old, block & ~<uint64_t>(LEAF_BLOCKS - 1), 0
            copy.goes_on = copy.page != 0
            if copy.page and old:
                self._copy_leaf_on(copy)
        elif wanted and copy.page and copy.done < LEAF_BLOCKS:
            self._copy_leaf_on(copy)
        else:
            copy.goes_on = False
            if right and not copy.refused and (not wanted or self._name_copy(place, copy)):
                return self.words(page_of(place[0]))
        return NULL

    cdef void fill_copy(self, LeafCopy* copy) noexcept nogil:
        """Write the holes of a first leaf, with no lock but the stripe: a page that is touched for the first time, and
        512 checks, are 20 us. Who looks through all pages that are nodes (age_on, a check) finds zeroes or holes, and
        neither names an object.
        """
        if copy.page and copy.source == 0:
            self._clear(copy.page, 0, copy.first)
            copy.done = LEAF_BLOCKS

    cdef void _copy_leaf_on(self, LeafCopy* copy) noexcept nogil:
        """Copy HOLD entries more: what they name has one holder more. What is not right stays so, and holds none."""
        cdef uint64_t* words = self.words(copy.page)
        cdef uint64_t* source = self.words(copy.source)
        cdef uint32_t stop = copy.done + HOLD
        cdef uint64_t entry
        cdef uint32_t handle
        cdef uint32_t index
        for index in range(copy.done, stop):
            handle = entry_handle(look64(source + index))
            if handle < self.store.cells.high:
                prefetch(self.store.cells.cell(handle))
        while copy.done < stop and not copy.refused:
            entry = look64(source + copy.done)  # readers make it younger
            handle = self.handle_at(entry, copy.first + copy.done)
            if handle and not self.store.is_whole(handle):
                handle = 0
            copy.refused = handle and not self.store.acquire(handle)
            if not copy.refused:
                words[copy.done] = entry
                copy.done += 1

    cdef bint _name_copy(self, uint64_t* place, LeafCopy* copy) noexcept nogil:
        """Let the copy, which is whole, take the place of its source."""
        must(copy.done == LEAF_BLOCKS, b"a node is filled before it is named")
        if copy.source:
            self._changes(copy.source)
            self.node(copy.source)[0] -= 1
        self._changes(copy.page)
        publish64(place, branch_word(self.seed, 1, copy.first >> LEAF_SHIFT, copy.page))
        copy.page = 0
        return True

    cdef bint forget_copy_on(self, LeafCopy* copy) noexcept nogil:
        """Undo some of a copy that nobody needs. True: there is more of it, once the lock was let go."""
        cdef uint64_t pages = self.store.slab.pages_used
        cdef uint32_t stop = copy.done - min(copy.done, <uint32_t>HOLD)
        cdef uint32_t handle
        cdef uint64_t* words
        if copy.page == 0:
            return False
        if copy.source == 0:
            copy.done = 0  # holes hold nothing
        words = self.words(copy.page)
        while copy.done > stop and pages < self.store.slab.pages_used + HOLD_PAGES:
            copy.done -= 1
            handle = self.handle_at(words[copy.done], copy.first + copy.done)
            words[copy.done] = 0
            if handle:
                self.store.release(handle)
        if copy.done == 0:
            self._retire(copy.page)
            copy.page = 0
        return copy.page != 0

    # -- counting ------------------------------------------------------------------------------------------------

    cdef bint is_same(self, uint64_t entry) noexcept nogil:
        """Whether an entry, which is right, is a same-filled block."""
        cdef uint32_t handle = entry_handle(entry)
        return entry & 1 or (handle and kind_of(self.store.cells.cell(handle).word) == KIND_FILL)

    cdef void count(self, uint64_t word, int level, uint64_t number, uint64_t* stored, uint64_t* same) noexcept nogil:
        """Add up the blocks stored, and the same-filled among them, below a word of `level`; those that are right."""
        cdef uint64_t* words = self.words(page_of(word))
        cdef uint64_t first = number << BRANCH_SHIFT if level <= TOP_LEVEL else 0
        cdef int index
        if page_of(word) == 0:
            return
        for index in range(BRANCH_CHILDREN):
            if level > 1:
                self.count(words[index], level - 1, first + index, stored, same)
            elif not is_hole(words[index]) and self.is_right(words[index], first + index):
                stored[0] += 1
                same[0] += self.is_same(words[index])

    cdef void age_on(self, uint32_t pages, uint32_t now) noexcept nogil:
        """Go on through the leaves, and let no entry grow so old that it looks young again."""
        cdef uint64_t end = self.page_end()
        cdef uint64_t* words
        cdef uint64_t entry
        cdef int index
        while pages and end:
            if self.aging >= end:
                self.aging = 0
            if self.node(<uint32_t>self.aging)[0] and self.node(<uint32_t>self.aging)[0] >> LEVEL_SHIFT == 0:
                words = self.words(<uint32_t>self.aging)
                for index in range(LEAF_BLOCKS):
                    entry = look64(words + index)
                    if entry_handle(entry) and age_of(entry, now) > AGE_OLDEST:
                        exchange64(words + index, entry, aged(entry, now - AGE_OLDEST))  # not over what a reader notes
            self.aging += 1
            pages -= 1

    # An arena opened again (opening.pyx): threads find nodes beside each other.

    cdef bint adoption_begin(self) noexcept nogil:
        """Make the counts of all nodes usable that there can be. False without memory."""
        cdef uint64_t size = <uint64_t>self.arena.unit_high * UNIT_PAGES * 4
        return region_ensure(&self.refs, size) and region_ensure(&self.refs_used, size // PAGE_SIZE // 8 + 1)

    cdef bint adopt(self, uint32_t page, int level, bint* fresh) noexcept nogil:
        """Count a node, or one place more that names it. False where it has another level.

        fresh: nobody found it before. One thread alone is told so, and looks at what is below.
        """
        cdef uint32_t* node = self.node(page)
        cdef uint64_t counts = <uint64_t>page * 4 // PAGE_SIZE
        if not look8(self.refs_used.base + counts // 8) >> (counts & 7) & 1 and claim_bit(
                self.refs_used.base + counts // 8, counts & 7):
            add64(&self.refs_pages, 1)
        fresh[0] = exchange32(node, 0, 1 | <uint32_t>level << LEVEL_SHIFT)
        if fresh[0]:
            add64(&self.nodes, 1)
            return True
        add32(node, 1)
        return look32(node) >> LEVEL_SHIFT == <uint32_t>level

    cdef bint adopt_unit(self, uint32_t unit) noexcept nogil:
        """Whether the unit holds nodes; its other pages are free nodes then."""
        cdef int index
        cdef uint32_t page
        cdef bint found = False, has_room
        if (<uint64_t>unit + 1) * UNIT_PAGES * 4 > self.refs.committed:
            return False
        for index in range(UNIT_PAGES):
            if self.parents(unit * UNIT_PAGES + index):
                found = True
        if not found:
            return False
        # Also where every page is a node: each of them may be free one day.
        has_room = region_ensure(&self.free_nodes, (self.nodes + self.free_count + UNIT_PAGES) * 4)
        for index in range(UNIT_PAGES):
            page = unit * UNIT_PAGES + index
            if self.parents(page) == 0:
                self.arena.release(<uint64_t>page * PAGE_SIZE, PAGE_SIZE)
                if has_room:
                    (<uint32_t*>self.free_nodes.base)[self.free_count] = page
                    self.free_count += 1
        return True

    cdef uint64_t pages(self) noexcept nogil:
        """Pages of nodes, of the counts of their parents and of the list of free ones."""
        return self.nodes + limbo_count(&self.limbo) + self.refs_pages + self.refs_used.pages + self.free_nodes.pages
