from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.ledger cimport Ledger
from nbdzram.engine.lock cimport Lock

cdef struct Region:
    uint8_t* base
    uint64_t reserved
    uint64_t committed
    uint64_t pages   # from its beginning, that are in use and counted
    Ledger* ledger   # where; NULL: nowhere

cdef bint region_reserve(Region* region, uint64_t size, Ledger* ledger) noexcept nogil
cdef bint region_ensure(Region* region, uint64_t size) noexcept nogil
cdef void region_expect(Region* region, uint64_t size) noexcept nogil
cdef void region_shrink(Region* region, uint64_t size) noexcept nogil
cdef void region_return(Region* region, uint64_t start, uint64_t length) noexcept nogil
cdef void region_free(Region* region) noexcept nogil

cdef class Arena:
    cdef uint8_t* base
    cdef uint64_t reserved
    cdef uint64_t mapped
    cdef uint32_t unit_high
    cdef uint32_t free_count
    cdef Region free_units
    cdef Ledger ledger      # of the pool whose arena it is
    cdef uint64_t declined  # times that the file system gave no page, ever
    cdef uint32_t refusal   # errno, of the last of them
    cdef Lock growing       # `mapped` changes under it alone
    cdef int fd
    cdef bint allocates         # pages are allocated in the file before they are touched
    cdef readonly str path      # of its file; None: it has none, or none with a name
    cdef readonly str place     # the same for a sentence
    cdef readonly bint opened

    cdef bint admit_writes(self) noexcept nogil
    cdef void cut(self, uint64_t size) noexcept nogil
    cdef int _allocate(self, uint64_t offset, uint64_t length, int mode) noexcept nogil
    cdef void make_ready(self) noexcept nogil
    cdef bint _map_up_to(self, uint64_t size) noexcept nogil
    cdef bint _map(self, uint64_t size) noexcept nogil
    cdef uint32_t take_run(self, uint32_t count) noexcept nogil
    cdef uint32_t take(self) noexcept nogil
    cdef void give(self, uint32_t unit) noexcept nogil
    cdef bint commit(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef bint holds(self, uint64_t offset) noexcept nogil
    cdef uint64_t held_from(self, uint64_t offset) noexcept nogil
    cdef void release(self, uint64_t offset, uint64_t length) noexcept nogil
