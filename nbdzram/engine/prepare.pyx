"""What blocks are to be stored as: all that can be found out before the pool's lock is taken to store them.

    recognize     one repeated word? Otherwise its fingerprint; what the index has of it is on its way from memory
    find_equal    inline folding only: objects with these fingerprints, held, decoded and compared
    encode        compressed, unless an equal object is known

Up to RUN blocks go through each of these together, so that memory is waited for once and not for every block.

Invariant: a block that was prepared with a handle holds that object, until it is an entry's (put_down) or abandoned.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from nbdzram.engine.cells cimport KIND_FILL, kind_of, length_of
from nbdzram.engine.codec cimport BLOCK, CODEC_LZ4, CODEC_RAW, fingerprint, lz4_compress, same_filled
from nbdzram.engine.lock cimport lock_leave, lock_take
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.prefetch cimport prefetch
from nbdzram.engine.store cimport HUGE_LENGTH

cdef enum:
    # LZ4 stops early when a block will not fit; its estimate near the end is pessimistic by a few bytes.
    LZ4_ROOM = HUGE_LENGTH + 64


cdef void prepare(
    PoolCore pool, uint64_t salt, const uint8_t* source, uint32_t count, uint8_t* encoded, Prepared* blocks
) noexcept nogil:
    """`count` adjacent blocks, at most RUN, of an export whose folding domain has this salt.

    `encoded` has room for as many, and is used as long as `blocks` is.
    """
    cdef uint32_t index
    for index in range(count):
        _recognize(pool, salt, source + index * BLOCK, &blocks[index])
    if pool.inline_on:
        _find_equal(pool, source, count, encoded, blocks)
    for index in range(count):
        if blocks[index].kind != KIND_FILL and blocks[index].handle == 0:
            _encode(pool, source + index * BLOCK, encoded + index * BLOCK, &blocks[index])


cdef bint prepare_encoded(
    PoolCore pool, uint64_t salt, const uint8_t* block, const uint8_t* encoded, uint32_t length, uint32_t kind,
    Prepared* prepared
) noexcept nogil:
    """A block that comes encoded already, and not from a client. Whether the pool has it: then that is used, whatever
    else the pool does at the write."""
    cdef uint8_t found[BLOCK]
    prepared.handle = 0
    prepared.kind = kind
    prepared.word = _fingerprint(pool, salt, block)
    _find_equal(pool, block, 1, found, prepared)
    if prepared.handle:
        return True
    prepared.kind = kind
    prepared.source = encoded
    prepared.length = length
    return False


cdef void prepare_zeroes(Prepared* block) noexcept nogil:
    """A block of zeroes, stored and no hole."""
    block.kind = KIND_FILL
    block.handle = 0
    block.word = 0


cdef void put_down(PoolCore pool, const Prepared* block) noexcept nogil:
    """Under the lock: the object that a block holds is about to be an entry's, or nobody's."""
    pool.store.cells.changes(block.handle)
    pool.in_hand[block.shift] -= 1


cdef void abandon(PoolCore pool, const Prepared* block) noexcept nogil:
    """Under the lock: a prepared block is not going to be stored."""
    if block.handle:
        put_down(pool, block)
        pool.store.release(block.handle)


cdef void _recognize(PoolCore pool, uint64_t salt, const uint8_t* source, Prepared* block) noexcept nogil:
    block.handle = 0
    block.kind = KIND_FILL
    if same_filled(source, &block.word):
        return
    block.kind = CODEC_LZ4
    block.word = _fingerprint(pool, salt, source)
    pool.store.index.prefetch_bucket(block.word)


cdef inline uint64_t _fingerprint(PoolCore pool, uint64_t salt, const uint8_t* block) noexcept nogil:
    """What a block of a folding domain with this salt is found by."""
    return (fingerprint(block, pool.seed) & pool.fingerprint_mask) ^ salt


cdef void _encode(PoolCore pool, const uint8_t* source, uint8_t* encoded, Prepared* block) noexcept nogil:
    pool.store.index.prefetch_chain(block.word)
    block.kind = CODEC_LZ4
    block.source = encoded
    block.length = lz4_compress(source, encoded, LZ4_ROOM)
    if block.length == 0 or block.length >= HUGE_LENGTH:
        block.kind = CODEC_RAW
        block.source = source
        block.length = BLOCK


cdef void _find_equal(
    PoolCore pool, const uint8_t* source, uint32_t count, uint8_t* encoded, Prepared* blocks
) noexcept nogil:
    """Give each block that the pool has already the handle of an object with exactly this content.

    Fingerprints only suggest. An object is held while its bytes, copied under the lock, are decoded and compared
    without it: meanwhile it may move, but neither change nor go.
    """
    cdef uint32_t index
    cdef Prepared* block
    for index in range(count):
        if blocks[index].kind != KIND_FILL:
            pool.store.index.prefetch_chain(blocks[index].word)
    lock_take(&pool.lock)
    for index in range(count):
        block = &blocks[index]
        if block.kind != KIND_FILL:
            _take_in_hand(pool, block)
    for index in range(count):
        block = &blocks[index]
        if block.handle:
            memcpy(encoded + index * BLOCK, block.source, block.length)
    lock_leave(&pool.lock)
    for index in range(count):
        block = &blocks[index]
        if block.handle and not _decodes_to(pool, block, encoded + index * BLOCK, source + index * BLOCK):
            lock_take(&pool.lock)
            abandon(pool, block)
            lock_leave(&pool.lock)
            block.handle = 0


cdef void _take_in_hand(PoolCore pool, Prepared* block) noexcept nogil:
    """Under the lock: hold the object that may be equal; where and what its bytes are, at this moment."""
    cdef uint64_t word
    block.handle = pool.store.index.first(block.word)
    if block.handle == 0 or not pool.store.acquire(block.handle):
        block.handle = 0
        return
    block.shift = pool.shift
    pool.in_hand[block.shift] += 1
    word = pool.store.cells.cell(block.handle).word
    block.kind = kind_of(word)
    block.length = length_of(word)
    block.source = pool.store.bytes_at(word)
    prefetch(block.source)


cdef bint _decodes_to(
    PoolCore pool, const Prepared* block, const uint8_t* encoded, const uint8_t* source
) noexcept nogil:
    cdef uint8_t decoded[BLOCK]
    if block.kind == CODEC_RAW:
        return memcmp(encoded, source, BLOCK) == 0
    return pool.store.decode(block.kind, encoded, block.length, decoded) and memcmp(decoded, source, BLOCK) == 0
