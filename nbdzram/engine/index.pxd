from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.arena cimport Region
from nbdzram.engine.cells cimport Cells
from nbdzram.engine.latch cimport Latch

cdef class Index:
    cdef Cells cells
    cdef Region heads    # of uint32_t, by bucket
    cdef Region pending  # a bit a handle
    cdef uint32_t buckets
    cdef uint32_t half   # the power of two with half <= buckets < 2 * half
    cdef uint64_t linked
    cdef uint64_t turns  # splits and merges: they change the order in a chain
    cdef uint64_t pending_count
    cdef Latch* latches
    cdef bint pausing   # threads step aside in the middle of a change (Pool.test_locks)

    cdef uint64_t bucket_of(self, uint64_t fingerprint) noexcept nogil
    cdef uint32_t* bucket(self, uint64_t number) noexcept nogil
    cdef void prefetch_bucket(self, uint64_t fingerprint) noexcept nogil
    cdef void prefetch_chain(self, uint64_t fingerprint) noexcept nogil
    cdef uint32_t first(self, uint64_t fingerprint) noexcept nogil
    cdef uint32_t find(self, uint64_t fingerprint, uint32_t after) noexcept nogil
    cdef bint reserve(self, uint32_t handle) noexcept nogil
    cdef void insert(self, uint32_t handle) noexcept nogil
    cdef void link(self, uint32_t handle) noexcept nogil
    cdef void remove(self, uint32_t handle) noexcept nogil
    cdef bint is_pending(self, uint32_t handle) noexcept nogil
    cdef void set_pending(self, uint32_t handle) noexcept nogil
    cdef void clear_pending(self, uint32_t handle) noexcept nogil
    cdef bint next_pending(self, uint32_t* handle) noexcept nogil
    cdef uint64_t pages(self) noexcept nogil

    cdef void expect(self, uint64_t objects) noexcept nogil
    cdef bint adopt(self, uint32_t handle, uint64_t fingerprint) noexcept nogil
    cdef void _put(self, uint32_t handle) noexcept nogil
    cdef void _unlink(self, uint32_t handle) noexcept nogil
    cdef bint fit(self, uint32_t limit) noexcept nogil
    cdef bint fits(self) noexcept nogil
    cdef Latch* latch(self, uint64_t fingerprint) noexcept nogil
    cdef bint insert_beside(self, uint32_t handle, uint64_t fingerprint) noexcept nogil
    cdef bint remove_beside(self, uint32_t handle, uint64_t fingerprint) noexcept nogil
    cdef void _take_out(self, uint32_t handle, uint64_t fingerprint) noexcept nogil
    cdef bint _split(self) noexcept nogil
    cdef void _merge(self) noexcept nogil
