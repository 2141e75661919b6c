from libc.stdint cimport int64_t, uint32_t, uint64_t

from nbdzram.engine.cursor cimport Cursor
from nbdzram.engine.directory cimport ExportEntry, Head
from nbdzram.engine.core cimport PoolCore

cdef enum:  # Extent (disk.pyi)
    HOLE_BIT = 1
    ZERO_BIT = 2
    SHARED_BIT = 4
    HUGE_BIT = 8
    SAME_FILLED_BIT = 16
    ALL_BITS = 31

cdef uint64_t SIZE_MAX  # bytes of an export at most

cdef class Blocks:
    # What readers look at, and nobody writes beside it.
    cdef readonly PoolCore pool
    cdef readonly uint32_t number
    cdef bint gone           # deleted, or its pool is closed
    cdef ExportEntry* _entry  # for root, readers and what changes it alone: it may be another's once this disk is gone
    cdef char apart[128]
    cdef readonly str name
    cdef uint32_t generation
    cdef bint made_read_only
    cdef readonly bint concealed  # not offered yet (directory.pyx): for who fills it alone
    cdef bint resizing
    cdef readonly uint32_t domain  # of folding
    cdef uint64_t salt       # of that
    cdef uint64_t size
    cdef uint64_t stored
    cdef uint64_t same
    cdef uint64_t quota      # blocks that may be stored; 0: as many as the pool has room for
    cdef uint64_t recounted  # blocks below are counted by the check under way
    cdef uint64_t found_stored, found_same  # among them
    cdef bint found_behind   # one that lies behind the end
    cdef uint64_t summed     # the last of the pool's sums (Pool.sum) that this export's blocks are part of
    cdef uint64_t wrong      # the first of them whose entry is not right; far behind the end when all are

    cdef Head* head(self) noexcept nogil
    cdef uint64_t* root(self) noexcept nogil
    cdef uint64_t* sound_root(self) noexcept nogil
    cdef bint is_sound(self) noexcept nogil
    cdef bint walk(self, Cursor* cursor) noexcept nogil
    cdef uint64_t end_block(self) noexcept nogil
    cdef void share_concealed(self, Blocks twin) noexcept nogil
    cdef void _share(self, Blocks twin) noexcept nogil
    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil
    cdef void _add(self, int64_t stored, int64_t same) noexcept nogil
    cdef void sum_up(self) noexcept nogil
    cdef void reveal(self) noexcept nogil
    cdef bint is_wrong(self) noexcept nogil
    cdef uint32_t count_on(self, uint32_t limit) noexcept nogil
    cdef uint32_t kind_bits(self, uint64_t entry, uint64_t block, bint leaf_shared) noexcept nogil
