from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.prepare cimport Prepared

cdef uint32_t clear_beside(PoolCore pool, Blocks disk, uint64_t first, uint32_t count, bint last) noexcept nogil
cdef uint32_t write_beside(
    PoolCore pool, Blocks disk, uint64_t first, uint32_t count, const Prepared* prepared, uint64_t end
) noexcept nogil
