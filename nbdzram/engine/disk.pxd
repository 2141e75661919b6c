from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from nbdzram.engine.pool cimport ExportEntry, Pool, pthread_mutex_t

cdef enum:
    STRIPES = 64

cdef struct Prepared:
    # A block that is ready to be stored.
    const uint8_t* source  # its encoded bytes
    uint32_t length        # of them
    uint32_t kind          # their codec; KIND_FILL for a repeated word, which has no bytes
    uint32_t handle        # an object with this content, in our hand; 0: none is known
    uint32_t shift         # since when (Pool.put_down)
    uint64_t word          # the fingerprint, or the repeated word

cdef class Disk:
    cdef readonly Pool pool
    cdef readonly uint32_t number
    cdef readonly str name
    cdef ExportEntry* entry
    cdef uint64_t size
    cdef uint64_t stored
    cdef uint64_t same
    cdef bint retired
    cdef uint64_t recounted  # blocks below are counted by the check under way
    cdef uint64_t found_stored, found_same  # among them
    cdef pthread_mutex_t stripes[STRIPES]

    # The caller has checked that the range lies inside the export. Each returns 0 or an errno value.
    cdef int c_read(self, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil
    cdef int c_write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil
    cdef int c_trim(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int c_zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil

    cdef pthread_mutex_t* _stripe(self, uint64_t block) noexcept nogil
    cdef int _read_block(self, uint64_t block, uint32_t start, uint32_t count, uint8_t* target) noexcept nogil
    cdef int _write_run(self, uint64_t first, uint32_t count, const uint8_t* source) noexcept nogil
    cdef void _prepare(self, const uint8_t* source, uint8_t* encoded, Prepared* block) noexcept nogil
    cdef int _commit(self, uint64_t first, uint32_t count, const Prepared* prepared) noexcept nogil
    cdef bint _replace(self, uint64_t* leaf, uint64_t block, const Prepared* block) noexcept nogil
    cdef int _write_part(self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source) noexcept nogil
    cdef void _swap(self, uint64_t* leaf, uint64_t block, uint64_t entry, bint same) noexcept nogil
    cdef int _fail(self) noexcept nogil
    cdef int _clear(self, uint64_t first, uint64_t end) noexcept nogil
    cdef int _clear_leaf(self, uint64_t first, uint64_t end) noexcept nogil
    cdef void _count(self, uint64_t block, int64_t stored, int64_t same) noexcept nogil
    cdef void _drop_shared_leaf(self, uint64_t first, uint32_t* place) noexcept nogil
    cdef uint32_t count_on(self, uint32_t limit) noexcept nogil
    cdef uint32_t _kind_bits(self, uint64_t entry, bint leaf_shared) noexcept nogil
