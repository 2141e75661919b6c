from nbdzram.engine.lock cimport Lock
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables

cdef bint may_retire(ObjectStore store, Tables tables) noexcept nogil
cdef bint reclaim(Lock* lock, ObjectStore store, Tables tables) noexcept nogil
cdef void reclaim_ripe(Lock* lock, ObjectStore store, Tables tables) noexcept nogil
cdef void fit_index(Lock* lock, ObjectStore store) noexcept nogil
cdef void keep_short(Lock* lock, ObjectStore store, Tables tables) noexcept nogil
