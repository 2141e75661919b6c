from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.census cimport Census
from nbdzram.engine.format cimport KEY_FILL, check_of
from nbdzram.engine.limbo cimport Limbo

cdef enum:
    # Kinds beyond the codecs (codec.pxd).
    KIND_FILL = 14
    KIND_FORWARD = 15

    REFS_SHIFT = 55
    REFS_MAX = 511
    CHUNK = 16  # handles whose holders beyond REFS_MAX are counted side by side: one line of a cache

    SEGMENT_CELLS = 65536
    SEGMENT_UNITS = 16
    CELLS_A_PAGE = 256

cdef struct Cell:
    uint64_t word
    uint64_t fingerprint

cdef inline uint32_t kind_of(uint64_t word) noexcept nogil:
    return word & 15

cdef inline uint32_t length_of(uint64_t word) noexcept nogil:
    return <uint32_t>((word >> 4) & 0xFFF) + 1

cdef inline uint32_t slot_of(uint64_t word) noexcept nogil:
    return (word >> 16) & 0x7FF

cdef inline uint32_t unit_of(uint64_t word) noexcept nogil:
    return (word >> 27) & 0xFFFFFFF

cdef inline uint32_t target_of(uint64_t word) noexcept nogil:
    return <uint32_t>(word >> 4)

cdef inline uint64_t refs_bits(uint64_t word) noexcept nogil:
    return word >> REFS_SHIFT << REFS_SHIFT

cdef inline uint64_t fill_word(uint64_t seed, uint64_t repeated) noexcept nogil:
    """What a cell is whose fingerprint is the repeated word of a block, without its holders."""
    return KIND_FILL | check_of(seed, KEY_FILL, 0, repeated) << 32 >> 28

cdef inline uint64_t object_word(uint32_t kind, uint32_t length, uint32_t slot, uint32_t unit) noexcept nogil:
    return kind | <uint64_t>(length - 1) << 4 | <uint64_t>slot << 16 | <uint64_t>unit << 27

cdef inline uint64_t handles_max(Arena arena) noexcept nogil:
    """Handles that can ever be: numbers have 32 bits, and each has its cell in the arena."""
    return min(<uint64_t>1 << 32, arena.reserved // sizeof(Cell))

cdef class Cells:
    # What readers look at, and others seldom write beside it.
    cdef Arena arena
    cdef uint32_t* segments   # first unit of each segment, as it was when it was taken or opened
    cdef uint32_t* directory  # the same in the arena
    cdef uint32_t high        # handles 1 .. high-1 have been used
    cdef char apart[128]
    cdef Region links         # of uint32_t, by handle
    cdef uint32_t free_head
    cdef Limbo limbo          # of retired handles: free cells, each linked to the one that was retired after it
    cdef uint32_t retired_head
    cdef uint32_t retired_tail
    cdef uint64_t live
    cdef uint64_t directory_pages  # of `directory`, that are in use
    cdef uint64_t cell_pages
    cdef Region chunk_of      # of uint32_t, by handle // CHUNK: the chunk of these handles; 0: none
    cdef Region chunks        # of CHUNK times uint32_t: holders beyond REFS_MAX. The first of a free one is the next
    cdef uint32_t chunks_high # chunks 1 .. chunks_high have been used
    cdef uint32_t chunk_free  # 0: none
    cdef Census census        # of a check under way, else None

    cdef Cell* cell(self, uint32_t handle) noexcept nogil
    cdef uint32_t* link(self, uint32_t handle) noexcept nogil
    cdef void changes(self, uint32_t handle) noexcept nogil
    cdef uint32_t alloc(self) noexcept nogil
    cdef uint32_t segments_held(self) noexcept nogil
    cdef uint32_t learn_segment(self, uint32_t segment) noexcept nogil
    cdef bint held(self, uint32_t handle) noexcept nogil
    cdef bint begin(self) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef void retire(self, uint32_t handle) noexcept nogil
    cdef void retire_later(self, uint32_t handle) noexcept nogil
    cdef uint32_t hand_out(self, uint32_t wanted, uint32_t* handles) noexcept nogil
    cdef void take_back(self, uint32_t handle) noexcept nogil
    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil
    cdef void free(self, uint32_t handle) noexcept nogil
    cdef uint64_t refs(self, uint32_t handle) noexcept nogil
    cdef bint can_count(self, uint32_t handle, uint64_t count) noexcept nogil
    cdef bint take_chunk(self, uint32_t handle) noexcept nogil
    cdef void add_refs(self, uint32_t handle, uint64_t count) noexcept nogil
    cdef bint drop_ref(self, uint32_t handle) noexcept nogil
    cdef uint64_t pages(self) noexcept nogil

    cdef void _list(self, uint32_t handle) noexcept nogil
    cdef uint64_t directory_at(self, uint32_t segment) noexcept nogil
    cdef bint _make_room(self, uint32_t handle) noexcept nogil
    cdef uint64_t _directory_page(self, uint32_t handle) noexcept nogil
    cdef bint _take_page(self, uint64_t offset) noexcept nogil
    cdef uint32_t* _beyond(self, uint32_t handle) noexcept nogil
    cdef uint32_t* _chunk(self, uint32_t number) noexcept nogil
    cdef bint _ensure(self, Region* region, uint64_t size) noexcept nogil
    cdef void _give_chunk(self, uint32_t handle) noexcept nogil
