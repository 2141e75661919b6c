"""The dictionaries of a pool: a few places, each used once in a process's life.

Which objects need one their codec says; readers decode with it without a lock, so a place is never given to another
dictionary while the pool is open. Opening an arena frees the places whose dictionary no object needs (opening.pyx).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from nbdzram.engine.codec cimport CODEC_DICTS, digest, zstd_free_ddict, zstd_new_ddict
from nbdzram.engine.format cimport dictionary_length, dictionary_unit, dictionary_word
from nbdzram.engine.ledger cimport ledger_give, ledger_take
from nbdzram.engine.lock cimport lock_leave, lock_take_behind
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.page cimport UNIT_SIZE, units_of
from nbdzram.engine.publish cimport publish64
from nbdzram.engine.store cimport dictionary_pages

from nbdzram.errors import EngineError


def dictionary_of(PoolCore pool, int number) -> bytes:
    """The content of dictionary `number`. Raises EngineError when there is none, or it is not what was written."""
    cdef const uint8_t* content
    cdef uint32_t length = dictionary_length(pool.superblock, number) if 0 <= number < CODEC_DICTS else 0
    if length == 0:
        raise EngineError(f"the pool has no dictionary {number}")
    content = pool.arena.base + <size_t>dictionary_unit(pool.superblock, number) * UNIT_SIZE
    if digest(content, length, pool.seed) != pool.superblock.digest[number]:
        raise EngineError(f"dictionary {number} is not what was written; run nbdzram check")
    return content[:length]


cdef int find_dictionary(PoolCore pool, const uint8_t* content, uint32_t length) noexcept nogil:
    """The number of a dictionary that the pool has already, or NO_DICTIONARY."""
    cdef int number
    for number in range(CODEC_DICTS):
        if pool.store.ddicts[number] != NULL and dictionary_length(pool.superblock, number) == length and memcmp(
                pool.arena.base + <size_t>dictionary_unit(pool.superblock, number) * UNIT_SIZE, content, length) == 0:
            return number
    return NO_DICTIONARY


cdef int keep_dictionary(PoolCore pool, const uint8_t* content, uint32_t length) noexcept nogil:
    """Give it the next number. NO_DICTIONARY when there is no room, or no number: a reader may be decoding with an old
    one.

    Its units are ours from the moment that they are taken, so it is written, and loaded, without the lock: that takes a
    millisecond.
    """
    cdef int number = 0
    cdef uint32_t count = units_of(length)
    cdef uint32_t unit = 0
    cdef uint32_t extra
    cdef uint64_t digested
    cdef void* ddict
    while number < CODEC_DICTS and pool.superblock.dictionary[number]:
        number += 1
    if number == CODEC_DICTS:
        return NO_DICTIONARY
    ddict = zstd_new_ddict(content, length)
    if ddict == NULL:
        return NO_DICTIONARY
    lock_take_behind(&pool.lock)
    if ledger_take(&pool.arena.ledger, dictionary_pages(length)):
        unit = pool.arena.take_run(count) if count > 1 else pool.arena.take()
        if unit == 0:
            ledger_give(&pool.arena.ledger, dictionary_pages(length))
    lock_leave(&pool.lock)
    if unit == 0 or not pool.arena.commit(<uint64_t>unit * UNIT_SIZE, length):
        zstd_free_ddict(ddict)
        lock_take_behind(&pool.lock)
        for extra in range(count if unit else 0):
            pool.arena.give(unit + extra)
        if unit:
            ledger_give(&pool.arena.ledger, dictionary_pages(length))
        lock_leave(&pool.lock)
        return NO_DICTIONARY
    memcpy(pool.arena.base + <uint64_t>unit * UNIT_SIZE, content, length)
    digested = digest(content, length, pool.seed)
    lock_take_behind(&pool.lock)
    pool.store.ddicts[number] = ddict
    pool.superblock.digest[number] = digested
    publish64(&pool.superblock.dictionary[number], dictionary_word(
        pool.seed, number, unit, length, pool.superblock.digest[number]))
    lock_leave(&pool.lock)
    return number
