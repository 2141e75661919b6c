from nbdzram.engine.core cimport PoolCore

cdef bint make_room(PoolCore pool, bint* waited) noexcept nogil
