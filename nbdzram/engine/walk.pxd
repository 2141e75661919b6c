from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Region
from nbdzram.engine.cursor cimport Cursor
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.core cimport PoolCore

cdef struct Found:
    # A block that is to be told.
    uint64_t block
    uint64_t word         # what it repeats (RUN_SAME), or its object's fingerprint (RUN_OBJECTS)
    uint32_t run          # of which kind of run it is
    uint32_t number       # of its object
    uint32_t kind         # how that is encoded, and in how many bytes; 0: not copied, as it was told before
    uint32_t length
    uint32_t origin_kind  # of the origin's object there, if only comparing tells whether it is the same; 0: none
    uint32_t origin_length

cdef class Told:
    cdef Region bits      # by handle

    cdef bint has(self, uint32_t handle) noexcept nogil
    cdef bint add(self, uint32_t handle) noexcept nogil

cdef class Walk:
    cdef PoolCore pool
    cdef Disk disk
    cdef Disk origin          # None: all is a hole there
    cdef Told told
    cdef Cursor cursor        # where it goes on to look
    cdef Found found[64]      # blocks of one hold, of which those from `settled` on are still to be told
    cdef uint32_t found_count, settled
    cdef uint32_t copied      # bytes in this hold
    cdef uint8_t* copies      # of the bytes of their objects, a block's room each; of the origin's objects behind them
    cdef uint8_t* objects
    cdef size_t objects_size
    cdef uint8_t* runs
    cdef size_t runs_size
    cdef size_t run_at        # of the head of the last run
    cdef uint64_t first       # block of the first run
    cdef uint64_t next        # block behind the last run
    cdef uint64_t blocks      # told in this step
    cdef uint32_t* told_numbers # of the objects that were told in this step
    cdef uint32_t told_count
    cdef uint32_t dictionaries  # bits of those that the objects of this step need
    cdef int trouble
    cdef uint64_t trouble_at

    cdef bint _fill(self) noexcept nogil
    cdef bint _look(self) noexcept nogil
    cdef bint _find_leaf(self) noexcept nogil
    cdef bint _judge(self, Found* found, uint64_t block, uint64_t entry, uint64_t before) noexcept nogil
    cdef void _copy(self, uint32_t handle, uint8_t* target, uint32_t* kind, uint32_t* length) noexcept nogil
    cdef bint _settle(self, uint32_t index) noexcept nogil
    cdef bint _add_object(self, const Found* found, const uint8_t* encoded, const uint8_t* block) noexcept nogil
    cdef void _add_run(self, const Found* found) noexcept nogil
    cdef void _begin_run(self, uint32_t kind, uint32_t count) noexcept nogil
    cdef bint _fails(self, int trouble, uint64_t block) noexcept nogil
