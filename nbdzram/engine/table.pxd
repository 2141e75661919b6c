from libc.stdint cimport int64_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.census cimport Census
from nbdzram.engine.format cimport mix
from nbdzram.engine.limbo cimport Limbo
from nbdzram.engine.store cimport ObjectStore

cdef enum:
    LEAF_BLOCKS = 512      # 2 MiB of an export
    LEAF_SHIFT = 9
    BRANCH_CHILDREN = 512
    BRANCH_SHIFT = 9
    TOP_LEVEL = 4          # a root's level; a leaf's is 0
    MAX_BLOCKS_SHIFT = 39  # of 9 + 4 * 9: 2 PiB

    LEVEL_SHIFT = 29       # of a node's level, above the count of its parents
    PARENTS_MASK = (1 << 29) - 1

    # An entry of one repeated word: a small number, or a pattern of 4 bytes.
    SAME_SHIFT = 18
    SAME_PATTERN = 1 << 17

    # An entry's age: when it was last used, in units of a minute modulo 2^15, which are 22 days.
    AGE_SHIFT = 17
    AGE_MASK = 0x7FFF
    AGE_SECONDS = 60       # see decision 12
    AGE_OLDEST = 20 * 24 * 60  # what is older than 20 days counts as so old; 2 days are left for clocks set back

cdef inline uint32_t entry_handle(uint64_t entry) noexcept nogil:
    """The handle of an entry that holds one, else 0 (a hole, or a same-filled word)."""
    return 0 if entry & 1 else <uint32_t>(entry >> 32)

cdef inline bint is_hole(uint64_t entry) noexcept nogil:
    return not entry & 1 and entry >> 32 == 0

cdef inline uint32_t page_of(uint64_t word) noexcept nogil:
    """The node that a branch's word, or a root, names; 0: all below are holes."""
    return <uint32_t>(word >> 32)

cdef inline uint32_t age_of(uint64_t entry, uint32_t now) noexcept nogil:
    """Units since the entry's block was used; 0 too when its time lies ahead of us, since clocks are set back."""
    cdef uint32_t age = (now - (<uint32_t>entry >> AGE_SHIFT)) & AGE_MASK
    return age if age <= AGE_OLDEST + (AGE_MASK - AGE_OLDEST) // 2 else 0

cdef inline uint64_t aged(uint64_t entry, uint32_t now) noexcept nogil:
    """The entry, used at another time."""
    return entry & ~(<uint64_t>AGE_MASK << AGE_SHIFT) | <uint64_t>(now & AGE_MASK) << AGE_SHIFT

cdef inline uint64_t place_key(int level, uint64_t number) noexcept nogil:
    """Names a word: `number` counts the words of a level over the whole export (for level 0: blocks)."""
    return <uint64_t>level << 56 | number

cdef inline uint64_t entry_word(uint64_t seed, uint64_t block, uint32_t handle, uint64_t fingerprint) noexcept nogil:
    """An entry without age. The check binds pool, place, handle and content, so that none of them can be another's."""
    cdef uint64_t check = mix(mix(seed, block) ^ handle, seed ^ fingerprint) & 0xFFFF
    return <uint64_t>handle << 32 | (check if check else 1) << 1

cdef inline uint64_t hole_word(uint64_t seed, uint64_t block) noexcept nogil:
    """An entry that says: a hole. It is never 0, so that a word that was cleared is no hole."""
    return entry_word(seed, block, 0, 0)

cdef inline uint64_t repeated_of(uint64_t entry) noexcept nogil:
    """The word of a same-filled entry."""
    cdef uint64_t pattern = <uint32_t>(entry >> SAME_SHIFT)
    return pattern | pattern << 32 if entry & SAME_PATTERN else <uint64_t>(<int64_t>entry >> SAME_SHIFT)

cdef inline uint64_t same_entry(uint64_t seed, uint64_t block, uint64_t repeated) noexcept nogil:
    """An entry whose block repeats a word; 0 if the word needs a handle of its own (KIND_FILL)."""
    cdef uint64_t check = mix(mix(seed, block), seed ^ repeated) & 0xFFFF
    cdef uint64_t entry = (check if check else 1) << 1 | 1
    if <uint64_t>(<int64_t>(repeated << SAME_SHIFT) >> SAME_SHIFT) == repeated:
        return entry | repeated << SAME_SHIFT
    if repeated >> 32 == <uint32_t>repeated:
        return entry | SAME_PATTERN | <uint64_t><uint32_t>repeated << SAME_SHIFT
    return 0

cdef inline uint64_t branch_word(uint64_t seed, int level, uint64_t number, uint32_t page) noexcept nogil:
    """What names a node, or none, in word `number` of `level`."""
    return <uint64_t>page << 32 | <uint32_t>mix(mix(seed, place_key(level, number)) ^ page, seed + level)

cdef struct LeafCopy:
    # A leaf on its way to being one of a table's own: the copy of one that several tables have, or the first one there.
    # No place names it before it is whole, but what stands in it holds what it names, as in any node.
    uint32_t page      # 0: none is under way
    uint32_t source    # 0: there was none, all are holes
    uint64_t first     # block of its first entry
    uint32_t done      # entries below are written
    bint refused       # there is no memory to count who holds what it names
    bint goes_on       # there is more to do, once the lock was let go

cdef class Tables:
    cdef Arena arena
    cdef ObjectStore store
    cdef uint64_t seed
    cdef Region refs        # of uint32_t, by page number: level and parents of a node, 0 for any other page
    cdef Region refs_used   # a bit a page of refs: it has nodes, and counts
    cdef uint64_t refs_pages
    cdef Region free_nodes  # of uint32_t: page numbers
    cdef uint32_t free_count
    cdef uint64_t nodes     # in use
    cdef Limbo limbo        # of retired nodes: pages that no word names any more, and a reader may still see
    cdef uint32_t* retired  # ... a ring
    cdef uint64_t aging     # the page at which age_on goes on
    cdef uint64_t no_leaf[LEAF_BLOCKS]  # entries that are none: what stands for a leaf that cannot be found
    cdef Census census      # of a check under way, else None

    cdef uint64_t* leaf(self, uint64_t* root, uint64_t block) noexcept nogil
    cdef bint is_lost(self, uint64_t* root, uint64_t block) noexcept nogil
    cdef uint64_t* place_of(self, uint64_t* root, uint64_t block) noexcept nogil
    cdef uint64_t* own_leaf_on(self, uint64_t* root, uint64_t block, LeafCopy* copy) noexcept nogil
    cdef void fill_copy(self, LeafCopy* copy) noexcept nogil
    cdef bint forget_copy_on(self, LeafCopy* copy) noexcept nogil
    cdef bint leaf_is_shared(self, uint64_t* root, uint64_t block) noexcept nogil
    cdef bint is_right(self, uint64_t entry, uint64_t block) noexcept nogil
    cdef uint32_t handle_at(self, uint64_t entry, uint64_t block) noexcept nogil
    cdef void acquire(self, uint32_t page) noexcept nogil
    cdef void share(self, uint64_t* root, uint64_t* twin) noexcept nogil
    cdef bint drop_share(self, uint64_t* place, int level, uint64_t number) noexcept nogil
    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil
    cdef void prune(self, uint64_t* root, uint64_t block) noexcept nogil
    cdef void give_node(self, uint64_t* place, int level, uint64_t number) noexcept nogil
    cdef bint is_same(self, uint64_t entry) noexcept nogil
    cdef void count(self, uint64_t word, int level, uint64_t number, uint64_t* stored, uint64_t* same) noexcept nogil
    cdef void age_on(self, uint32_t pages, uint32_t now) noexcept nogil
    cdef bint adoption_begin(self) noexcept nogil
    cdef bint adopt(self, uint32_t page, int level, bint* fresh) noexcept nogil
    cdef bint adopt_unit(self, uint32_t unit) noexcept nogil
    cdef uint64_t pages(self) noexcept nogil

    cdef uint64_t* words(self, uint32_t page) noexcept nogil
    cdef uint32_t* node(self, uint32_t page) noexcept nogil
    cdef uint64_t page_end(self) noexcept nogil
    cdef uint32_t parents(self, uint32_t page) noexcept nogil
    cdef bint _is_empty(self, uint32_t page, int level, uint64_t block) noexcept nogil
    cdef bint _names_nothing(self, uint32_t page, int level) noexcept nogil
    cdef void _changes(self, uint32_t page) noexcept nogil
    cdef uint64_t export_of(self, uint64_t* root) noexcept nogil
    cdef uint64_t _number(self, uint64_t* root, int level, uint64_t block) noexcept nogil
    cdef bint is_word(self, uint64_t word, int level, uint64_t number) noexcept nogil
    cdef bint reserve_refs(self, uint32_t unit) noexcept nogil
    cdef uint32_t _take(self, int level) noexcept nogil
    cdef void _retire(self, uint32_t page) noexcept nogil
    cdef bint _own(self, uint64_t* root, uint64_t* place, int level, uint64_t block) noexcept nogil
    cdef void _clear(self, uint32_t page, int level, uint64_t block) noexcept nogil
    cdef void _copy_branch(self, uint32_t page, uint32_t source, int level, uint64_t block) noexcept nogil
    cdef void _copy_leaf_on(self, LeafCopy* copy) noexcept nogil
    cdef bint _name_copy(self, uint64_t* place, LeafCopy* copy) noexcept nogil
