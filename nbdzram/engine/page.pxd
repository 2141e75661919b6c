# How memory is measured: pages, as the system gives it, and units, as an arena hands out addresses (arena.pyx).

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PAGE_SIZE = 4096
    UNIT_SIZE = 65536
    UNIT_PAGES = 16

cdef inline uint32_t units_of(uint64_t size) noexcept nogil:
    """Units that `size` bytes take."""
    return <uint32_t>((size + UNIT_SIZE - 1) // UNIT_SIZE)

cdef inline uint64_t pages_for(uint64_t size) noexcept nogil:
    """Pages that `size` bytes take."""
    return (size + PAGE_SIZE - 1) // PAGE_SIZE
