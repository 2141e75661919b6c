from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.lock cimport Lock
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables
from nbdzram.engine.users cimport Users

cdef bint drop_tree(
    Lock* lock, Users* users, ObjectStore store, Tables tables, uint64_t* place, int level, uint64_t number,
    uint32_t* left
) noexcept nogil
