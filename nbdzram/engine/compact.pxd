from nbdzram.engine.pool cimport Pool

cdef bint make_room(Pool pool, bint* waited) noexcept nogil
