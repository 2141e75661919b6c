from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.adoption cimport Share
from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.directory cimport Directory
from nbdzram.engine.format cimport Superblock
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables

cdef enum:
    COMPLAINT = 200  # bytes of a sentence

    # Whose a unit is.
    NOBODYS = 0
    FIXED = 1     # superblock and directories
    CELLS = 2
    DICTIONARY = 3
    NODES = 4
    ZSPAGE = 5

cdef struct BlockCount:
    uint64_t stored
    uint64_t same    # of these, blocks of one repeated word
    uint32_t shares  # whether it has nodes that were found before, of others or of its own

cdef struct Branch:  # of level 1
    uint32_t export
    uint32_t page
    uint64_t first   # number of the word of level 1 that it begins with

cdef class Opening:
    cdef Arena arena
    cdef ObjectStore store
    cdef Tables tables
    cdef Directory directory
    cdef Superblock* superblock
    cdef Region owners            # of uint8_t, by unit
    cdef Region holders           # of uint32_t, by handle: entries that lead to it
    cdef Region branches          # of Branch: whose leaves are to be looked at
    cdef uint32_t branch_count
    cdef uint32_t segments        # of cells
    cdef uint32_t exports_high    # entries of the directory below have been used
    cdef uint64_t used[16]        # objects of each kind
    cdef uint32_t faults          # whether one was found
    cdef uint64_t wrong           # entries of leaves that are not right
    cdef Region counts            # of BlockCount, by export
    cdef Region shares            # of Share, in the order of their handles
    cdef object together          # runs functions at the same time
    cdef char complaint[COMPLAINT]

    cdef bint _is_kept(self, uint32_t number) noexcept nogil
    cdef str _name_of(self, uint32_t number)
    cdef bint _is_too_large(self, uint64_t size) noexcept nogil
    cdef bint _find_places(self) noexcept nogil
    cdef size_t _room(self) noexcept nogil
    cdef bint _claim(self, uint32_t unit, uint32_t count, int owner) noexcept nogil
    cdef bint _find_segments(self) noexcept nogil
    cdef void _find_cells(self) noexcept nogil
    cdef bint _find_dictionaries(self) noexcept nogil
    cdef bint _find_exports(self) noexcept nogil
    cdef bint _find_node(self, uint32_t page, int level, bint* fresh) noexcept nogil
    cdef bint _walk(self, uint32_t export, uint64_t word, int level, uint64_t number) noexcept nogil
    cdef bint _follow(self, uint32_t export, uint64_t word, int level, uint64_t number, bint* fresh) noexcept nogil
    cdef bint _note_branch(self, uint32_t export, uint32_t page, uint64_t first) noexcept nogil
    cdef bint _find_leaf(self, uint32_t export, uint64_t word, uint64_t number) noexcept nogil
    cdef void _add(self, uint32_t export, uint64_t stored, uint64_t same, uint64_t wrong) noexcept nogil
    cdef bint _hold(self, uint32_t handle) noexcept nogil
    cdef bint _find_object(self, uint32_t handle, Share* share, uint64_t* used) noexcept nogil
    cdef bint _has_counts(self) noexcept nogil
    cdef bint _has_dictionaries(self) noexcept nogil
    cdef void _cut_shares(self) noexcept nogil
    cdef void _expect_objects(self) noexcept nogil
    cdef void _add_shares(self) noexcept nogil
    cdef void _free_units(self) noexcept nogil
