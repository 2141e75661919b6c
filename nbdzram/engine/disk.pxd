from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.foresight cimport Foreseen
from nbdzram.engine.lock cimport Lock
from nbdzram.engine.prepare cimport Prepared

cdef enum:
    STRIPES = 64

cdef class Disk(Blocks):
    cdef Lock stripes[STRIPES]

    cdef void c_foresee(self, const Foreseen* blocks, uint32_t count) noexcept nogil

    # The caller has checked that the range lies inside the export. Each returns 0 or an errno value.
    cdef int c_read(self, uint64_t offset, uint64_t length, uint8_t* target) noexcept nogil
    cdef int c_write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil
    cdef int c_trim(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int c_zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil

    cdef int _transfer_buffer(self, uint64_t offset, object buffer, bint writing) except -1
    cdef int _transfer(self, uint64_t offset, uint64_t length, uint8_t* place, bint writing) except -1
    cdef Lock* _stripe(self, uint64_t block) noexcept nogil
    cdef int _write_run(self, uint64_t first, uint32_t count, const uint8_t* source) noexcept nogil
    cdef int _commit(
        self, uint64_t first, uint32_t count, const Prepared* prepared, uint64_t end, uint32_t* stored
    ) noexcept nogil
    cdef bint _is_beyond(self, const uint64_t* leaf, uint64_t block) noexcept nogil
    cdef bint _replace(self, uint64_t* leaf, uint64_t block, const Prepared* block) noexcept nogil
    cdef int _write_part(self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source) noexcept nogil
    cdef int _store_part(
        self, uint64_t block, uint32_t start, uint32_t count, const uint8_t* source, uint64_t end
    ) noexcept nogil
    cdef void _swap(self, uint64_t* leaf, uint64_t block, uint64_t entry, bint same) noexcept nogil
    cdef int _refused(self, int error) noexcept nogil
    cdef int _clear_all(self) noexcept nogil
    cdef int _clear(self, uint64_t first, uint64_t end) noexcept nogil
    cdef int _clear_leaf(self, uint64_t first, uint64_t end) noexcept nogil
    cdef int _clear_alone(self, uint64_t first, uint64_t* block, uint64_t end) noexcept nogil
    cdef int _clear_some(self, uint64_t* block, uint64_t end) noexcept nogil
    cdef int _write(self, uint64_t offset, uint64_t length, const uint8_t* source) noexcept nogil
    cdef int _zero(self, uint64_t offset, uint64_t length, bint no_hole) noexcept nogil
    cdef int _resize(self, uint64_t size) noexcept nogil
    cdef int _take_size(self, uint64_t size) noexcept nogil
    cdef int clear_behind(self, uint64_t reach) noexcept nogil
    cdef void _shrunk_to(self, uint64_t end) noexcept nogil
