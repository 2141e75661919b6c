from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.core cimport PoolCore

cdef enum:
    RUN = 8  # blocks prepared together, and stored under one hold of the lock: about 4 us

cdef struct Prepared:
    # A block that is ready to be stored.
    const uint8_t* source  # its encoded bytes
    uint32_t length        # of them
    uint32_t kind          # their codec; KIND_FILL for a repeated word, which has no bytes
    uint32_t handle        # an object with this content, in our hand; 0: none is known
    uint32_t shift         # since when (Pool.shift)
    uint64_t word          # the fingerprint, or the repeated word

cdef void prepare(
    PoolCore pool, uint64_t salt, const uint8_t* source, uint32_t count, uint8_t* encoded, Prepared* blocks
) noexcept nogil
cdef bint prepare_encoded(
    PoolCore pool, uint64_t salt, const uint8_t* block, const uint8_t* encoded, uint32_t length, uint32_t kind,
    Prepared* prepared
) noexcept nogil
cdef void prepare_zeroes(Prepared* block) noexcept nogil
cdef void put_down(PoolCore pool, const Prepared* block) noexcept nogil
cdef void abandon(PoolCore pool, const Prepared* block) noexcept nogil
