from libc.stdint cimport uint8_t, uint32_t

from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.page cimport UNIT_SIZE

cdef enum:
    NO_DICTIONARY = -1
    LARGEST_DICTIONARY = 4 * UNIT_SIZE  # see recompress.pyx; twice as much gains another 2 % at most

# Under the maintenance lock: only who holds it uses numbers of dictionaries up.
cdef int find_dictionary(PoolCore pool, const uint8_t* content, uint32_t length) noexcept nogil
cdef int keep_dictionary(PoolCore pool, const uint8_t* content, uint32_t length) noexcept nogil
