from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.arena cimport Region
from nbdzram.engine.opening cimport Opening

cdef struct Planned:
    uint64_t number
    uint32_t old       # the old node that this one follows from
    uint32_t level

cdef class OldOpening(Opening):
    cdef Region places     # of uint64_t, by page: where an old node stands in its tree; 0: not found yet
    cdef Region made       # of uint32_t, PARTS a page: which of the new nodes its parts become, from 1
    cdef Region plan       # of Planned: the new nodes, in the order in which they will lie
    cdef uint32_t planned
    cdef bint out_of_memory
    cdef uint32_t first    # page of the first new node

    cdef uint32_t* branch(self, uint32_t page) noexcept nogil
    cdef bint _walk_old(self, uint32_t export, uint32_t page, int level, uint64_t number) noexcept nogil
    cdef bint _lead(self, uint32_t export, uint64_t block, uint64_t entry) noexcept nogil
    cdef bint _find_place(self, uint32_t page, int level, uint64_t number) noexcept nogil
    cdef uint32_t _below(self, uint32_t old, int level, uint64_t number) noexcept nogil
    cdef uint32_t* _made(self, uint32_t old, int level, uint64_t number) noexcept nogil
    cdef uint32_t _plan_node(self, uint32_t old, int level, uint64_t number) noexcept nogil
    cdef bint _plan_exports(self) noexcept nogil
    cdef uint32_t _page_of(self, uint32_t old, int level, uint64_t number) noexcept nogil
    cdef void _write_nodes(self, uint32_t now) noexcept nogil
    cdef void _write_leaf(self, uint64_t* words, const uint64_t* old, uint64_t first, uint32_t now) noexcept nogil
    cdef void _check_fills(self) noexcept nogil
    cdef void _write_exports(self) noexcept nogil
    cdef void _write_superblock(self) noexcept nogil
