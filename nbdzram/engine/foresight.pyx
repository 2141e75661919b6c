"""Foresight: blocks that are wanted at about the same time wait for memory once, and not one after the other.

    sweep 1   the way down to each leaf ................ its entry is on its way from memory
    sweep 2   each entry, near by now .................. its object's cell
    sweep 3   each cell ................................ to be read: the object's bytes
                                                         to be replaced: the object's bucket in the index

Of a large export none of these is in a processor's cache, and each says where the next one is: a request alone waits
three times. Nothing is promised by this, and nothing changed: what was brought near may be another's when it is looked
at, and is looked at then as if nobody had been here.

Invariant: the rules are those of readers (reading.pyx): the thread is online, and what is followed lies in the arena,
also where memory changed under us. Fetching itself cannot fail, whatever the address.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.cells cimport Cell, kind_of, length_of
from nbdzram.engine.codec cimport CODEC_DICTS, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.core cimport PoolCore
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.prefetch cimport prefetch, prefetch_aside, prefetch_to_write
from nbdzram.engine.publish cimport look32, look64
from nbdzram.engine.quiescence cimport offline, online
from nbdzram.engine.table cimport BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, TOP_LEVEL, entry_handle, page_of

cdef enum:
    LINE = 64  # bytes
    PAGES_OF_UNIT = UNIT_SIZE // PAGE_SIZE


cdef void foresee(Blocks disk, const Foreseen* blocks, uint32_t count) noexcept nogil:
    """Up to FORESEEN blocks of an export."""
    if not online():
        return
    if not look32(&disk.pool.closing):
        _foresee(disk.pool, disk, blocks, count)
    offline()


cdef void foresee_reading(PoolCore pool, Blocks disk, uint64_t first, uint64_t count) noexcept nogil:
    """The first FORESEEN of `count` adjacent blocks; one alone waits as long either way. The caller is online."""
    cdef Foreseen blocks[FORESEEN]
    cdef uint32_t index
    if count < 2:
        return
    count = min(count, <uint64_t>FORESEEN)
    for index in range(count):
        blocks[index].block = first + index
        blocks[index].read = True
    _foresee(pool, disk, blocks, count)


cdef void _foresee(PoolCore pool, Blocks disk, const Foreseen* blocks, uint32_t count) noexcept nogil:
    cdef uint64_t* places[FORESEEN]
    cdef Cell* cells[FORESEEN]
    cdef uint32_t high = look32(&pool.store.cells.high)
    cdef uint64_t pages = <uint64_t>look32(&pool.arena.unit_high) * PAGES_OF_UNIT
    cdef uint32_t index, handle
    for index in range(count):
        if index and blocks[index].block == blocks[index - 1].block + 1 and blocks[index].block % LEAF_BLOCKS:
            places[index] = places[index - 1] + 1 if places[index - 1] != NULL else NULL
        else:
            places[index] = _place(pool, disk, blocks[index].block, pages)
        _bring(places[index], blocks[index].read)
    for index in range(count):
        handle = entry_handle(look64(places[index])) if places[index] != NULL else 0
        cells[index] = pool.store.cells.cell(handle) if 0 < handle < high else NULL
        _bring(cells[index], blocks[index].read)
    for index in range(count):
        if cells[index] == NULL:
            continue
        if blocks[index].read:
            _bring_object(pool, look64(&cells[index].word))
        else:
            pool.store.index.prefetch_bucket(cells[index].fingerprint)


cdef inline void _bring(const void* place, bint read) noexcept nogil:
    """What is written is wanted alone: a copy that others have as well would have to be asked for twice."""
    if read:
        prefetch(place)
    else:
        prefetch_to_write(place)


cdef uint64_t* _place(PoolCore pool, Blocks disk, uint64_t block, uint64_t pages) noexcept nogil:
    """Where the entry of a block stands; NULL: there is none. The words on the way may be wrong."""
    cdef uint64_t* place = &disk._entry.root
    cdef uint32_t page
    cdef int level = TOP_LEVEL + 1
    while level:
        page = page_of(look64(place))
        if not 0 < page < pages:
            return NULL
        level -= 1
        place = (<uint64_t*>(pool.arena.base + <uint64_t>page * PAGE_SIZE)
                 + (block >> (level * BRANCH_SHIFT) & (BRANCH_CHILDREN - 1)))
    return place


cdef void _bring_object(PoolCore pool, uint64_t word) noexcept nogil:
    cdef const uint8_t* first
    cdef uint32_t at = 0
    if not CODEC_RAW <= kind_of(word) < CODEC_ZSTD_DICT + CODEC_DICTS:
        return
    first = pool.store.bytes_at(word)
    while at < length_of(word):
        prefetch_aside(first + at)
        at += LINE
