from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.census cimport Census
from nbdzram.engine.store cimport ObjectStore

cdef enum:
    LEAF_BLOCKS = 512      # 2 MiB of an export
    LEAF_SHIFT = 9
    BRANCH_CHILDREN = 1024
    BRANCH_SHIFT = 10
    TOP_LEVEL = 3          # a root's level; a leaf's is 0
    MAX_BLOCKS_SHIFT = 39  # 9 + 3 * 10: 2 PiB

    LEVEL_SHIFT = 30       # of a node's level, above the count of its parents
    PARENTS_MASK = (1 << 30) - 1

cdef inline uint32_t entry_handle(uint64_t entry) noexcept nogil:
    """The handle of an entry that holds one, else 0 (a hole, or a same-filled word)."""
    return 0 if entry & 1 else <uint32_t>(entry >> 32)

cdef class Tables:
    cdef Arena arena
    cdef ObjectStore store
    cdef Region refs        # of uint32_t, by page number: level and parents of a node, 0 for any other page
    cdef Region free_nodes  # of uint32_t: page numbers
    cdef uint32_t free_count
    cdef uint64_t nodes     # in use
    cdef Census census      # of a check under way, else None

    cdef uint64_t* leaf(self, uint32_t root, uint64_t block) noexcept nogil
    cdef uint64_t* next_leaf(self, uint32_t root, uint64_t* block, uint64_t end) noexcept nogil
    cdef uint32_t* place_of(self, uint32_t* root, uint64_t block) noexcept nogil
    cdef uint64_t* leaf_for_write(self, uint32_t* root, uint64_t block) noexcept nogil
    cdef bint leaf_is_shared(self, uint32_t root, uint64_t block) noexcept nogil
    cdef void acquire(self, uint32_t page) noexcept nogil
    cdef bint drop_share(self, uint32_t* place) noexcept nogil
    cdef void give_node(self, uint32_t* place) noexcept nogil
    cdef void prune(self, uint32_t* root, uint64_t block) noexcept nogil
    cdef bint is_same(self, uint64_t entry) noexcept nogil
    cdef void count(self, uint32_t page, int level, uint64_t* stored, uint64_t* same) noexcept nogil
    cdef bint adopt(self, uint32_t page, int level) noexcept nogil
    cdef bint adopt_unit(self, uint32_t unit) noexcept nogil
    cdef uint64_t metadata(self) noexcept nogil

    cdef uint32_t* branch(self, uint32_t page) noexcept nogil
    cdef uint64_t* entries(self, uint32_t page) noexcept nogil
    cdef uint32_t* node(self, uint32_t page) noexcept nogil
    cdef uint64_t page_end(self) noexcept nogil
    cdef uint32_t parents(self, uint32_t page) noexcept nogil
    cdef bint _is_empty(self, uint32_t page) noexcept nogil
    cdef void _changes(self, uint32_t page) noexcept nogil
    cdef uint32_t _take(self, int level) noexcept nogil
    cdef bint _own(self, uint32_t* place, int level) noexcept nogil
