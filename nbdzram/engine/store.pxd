from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena, Region
from nbdzram.engine.cells cimport Cells
from nbdzram.engine.index cimport Index
from nbdzram.engine.lock cimport Lock
from nbdzram.engine.page cimport pages_for
from nbdzram.engine.slab cimport Slab

cdef enum:
    HUGE_LENGTH = 3625
    FORWARDS_MAX = 4096  # in a row: each leads to a shorter encoding, or to one that is as long
    KINDS = 8

cdef inline uint64_t dictionary_pages(uint32_t length) noexcept nogil:
    """Pages of a dictionary: its own in the arena, and as many of the copy that Zstandard keeps."""
    return 2 * pages_for(length)

cdef class ObjectStore:
    cdef Arena arena
    cdef Slab slab
    cdef Cells cells
    cdef Index index
    cdef void* ddicts[4]
    cdef uint64_t seed              # of the fingerprints
    cdef uint64_t fingerprint_mask  # tests make fingerprints equal
    cdef char apart[128]            # before it stands what readers look at; behind it what writers count
    cdef Lock depot                 # of slab, cells and ledger among threads that write beside each other (kit.pyx)
    cdef bint depot_made
    cdef char counted[128]
    cdef uint64_t bytes_of[KINDS]    # bytes of distinct objects, by codec
    cdef uint64_t objects
    cdef uint64_t shared_objects
    cdef uint64_t shared_bytes
    cdef uint64_t huge_now
    cdef uint64_t huge_ever
    cdef uint64_t folded
    cdef uint64_t moved
    cdef uint64_t recompressed
    cdef uint64_t pages_compacted
    cdef Region tried          # a bit a handle: as small as recompression makes it
    cdef int tried_strength    # of that recompression
    cdef uint64_t tried_bytes  # of the LZ4 objects among them

    cdef uint32_t put(self, const uint8_t* encoded, uint32_t length, uint32_t kind, uint64_t fingerprint) noexcept nogil
    cdef uint32_t put_fill(self, uint64_t word) noexcept nogil
    cdef uint32_t resolve(self, uint32_t handle) noexcept nogil
    cdef bint is_sound(self, uint32_t first, uint32_t last) noexcept nogil
    cdef bint is_whole(self, uint32_t first) noexcept nogil
    cdef bint acquire(self, uint32_t handle) noexcept nogil
    cdef bint _can_count(self, uint32_t handle) noexcept nogil
    cdef void release(self, uint32_t handle) noexcept nogil
    cdef const uint8_t* bytes_at(self, uint64_t word) noexcept nogil
    cdef bint decode(self, uint32_t kind, const uint8_t* encoded, uint32_t length, uint8_t* block) noexcept nogil
    cdef bint decode_right(
        self, uint32_t kind, const uint8_t* encoded, uint32_t length, uint64_t fingerprint, uint8_t* block
    ) noexcept nogil
    cdef bint is_block(self, const uint8_t* block, uint64_t expected) noexcept nogil
    cdef void merge(self, uint32_t loser, uint32_t winner) noexcept nogil
    cdef bint move(self, uint32_t handle) noexcept nogil
    cdef bint replace(self, uint32_t handle, const uint8_t* encoded, uint32_t length, uint32_t kind) noexcept nogil
    cdef Region begin_trying(self, int strength, Region fresh) noexcept nogil
    cdef bint was_tried(self, uint32_t handle) noexcept nogil
    cdef void set_tried(self, uint32_t handle) noexcept nogil
    cdef bint expect_tried(self) noexcept nogil
    cdef void adopt_tried(self, uint32_t handle) noexcept nogil

    cdef void _count(self, uint64_t word, int sign) noexcept nogil
    cdef bint _take_slot(self, uint32_t length, uint32_t* unit, uint32_t* slot, int cause) noexcept nogil
    cdef void forget_tried(self, uint32_t handle) noexcept nogil
    cdef void _forget(self, uint32_t handle, uint64_t word) noexcept nogil
