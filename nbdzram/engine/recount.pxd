from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.census cimport Census
from nbdzram.engine.slab cimport MAX_CLASSES, MAX_SLOTS, Slab, ZSpage
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables

cdef enum:
    SLOT_WORDS = MAX_SLOTS // 64

cdef uint32_t judge_slots(Slab slab, uint32_t unit, uint64_t* slots, char* complaint) noexcept nogil

cdef class CellCensus(Census):
    cdef ObjectStore store
    cdef uint64_t live, objects, huge, pending, shared_objects, shared_bytes
    cdef uint64_t bytes_of[16]
    cdef uint64_t slots_of[MAX_CLASSES]

    cdef bint _reaches(self, ZSpage* page, uint32_t slot) noexcept nogil

cdef class ZspageCensus(Census):
    cdef Slab slab
    cdef uint64_t zspages[MAX_CLASSES]
    cdef uint64_t pages[MAX_CLASSES]
    cdef uint64_t used[MAX_CLASSES]

cdef class NodeCensus(Census):
    cdef Tables tables
    cdef uint64_t nodes
