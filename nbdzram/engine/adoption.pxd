from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.codec cimport CODEC_DICTS, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.cells cimport kind_of
from nbdzram.engine.store cimport KINDS, ObjectStore

cdef struct Share:
    uint32_t first        # handle
    uint32_t end          # behind its last
    uint32_t unit         # that the survey claimed last: what was written together lies together
    bint crowded          # a handle has more holders than its cell counts
    uint32_t free_first   # free handles, the highest first, by their links; 0: none
    uint32_t free_last
    uint64_t live
    uint64_t linked
    uint64_t pending
    uint64_t objects
    uint64_t huge
    uint64_t bytes_of[KINDS]
    uint64_t shared_objects
    uint64_t shared_bytes

cdef inline bint is_object(uint64_t word) noexcept nogil:
    return CODEC_RAW <= kind_of(word) < CODEC_ZSTD_DICT + CODEC_DICTS

cdef void adopt_share(ObjectStore store, const uint32_t* holders, Share* share) noexcept nogil
cdef void add_share(ObjectStore store, const Share* share) noexcept nogil
