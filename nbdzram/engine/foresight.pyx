"""Bringing near what requests will look at that came together: so that memory is waited for once, and not for each.

    sweep 1   the way down to each block's leaf ......................... its entry is on its way from memory
    sweep 2   each entry that is near now ............................... its object's cell
    sweep 3   each cell ................................................. to be read: the object's first bytes
                                                                          to be replaced: its bucket in the index

A request for a block of a large export finds none of these in the processor's caches, and needs one to know where the next
is. Nothing is promised: what was brought near may be another's, or wrong, by the time it is looked at, and is looked at then
as if nobody had been here. So here the rules are those of readers (reading.pyx) and no more: the thread is online, what
a word leads to lies inside the arena.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.blocks cimport Blocks
from nbdzram.engine.cells cimport Cell, kind_of, length_of, slot_of, unit_of
from nbdzram.engine.codec cimport CODEC_DICTS, CODEC_RAW, CODEC_ZSTD_DICT
from nbdzram.engine.pool cimport Pool
from nbdzram.engine.publish cimport look32, look64
from nbdzram.engine.quiescence cimport offline, online
from nbdzram.engine.table cimport BRANCH_CHILDREN, BRANCH_SHIFT, TOP_LEVEL, branch_word, entry_handle, page_of

cdef extern from * nogil:
    void __builtin_prefetch(const void*)

cdef enum:
    LINE = 64     # bytes
    LINES = 32     # of an object; by then the processor has seen where it goes


cdef void foresee(Blocks disk, const Foreseen* blocks, int count) noexcept nogil:
    """For up to FORESEEN blocks of an export."""
    cdef uint64_t* places[FORESEEN]
    cdef Cell* cells[FORESEEN]
    cdef int index
    cdef uint32_t handle, high
    if not online():
        return
    if not look32(&disk.pool.closing) and not look32(<uint32_t*>&disk.gone):
        high = look32(&disk.pool.store.cells.high)
        for index in range(count):
            places[index] = _place(disk.pool, disk, blocks[index].block)
            if places[index] != NULL:
                __builtin_prefetch(places[index])
        for index in range(count):
            cells[index] = NULL
            if places[index] != NULL:
                handle = entry_handle(look64(places[index]))
                if 0 < handle < high:
                    cells[index] = disk.pool.store.cells.cell(handle)
                    __builtin_prefetch(cells[index])
        for index in range(count):
            if cells[index] != NULL:
                if blocks[index].read:
                    _bring_object(disk.pool, look64(&cells[index].word))
                else:
                    disk.pool.store.index.prefetch_bucket(cells[index].fingerprint)
    offline()


cdef uint64_t* _place(Pool pool, Blocks disk, uint64_t block) noexcept nogil:
    """Where the entry of a block stands; NULL: there is none, or not now."""
    cdef uint64_t* place = &disk._entry.root
    cdef uint64_t word
    cdef int level = TOP_LEVEL + 1
    while level:
        word = look64(place)
        if page_of(word) == 0 or word != branch_word(
                pool.seed, level, block >> (level * BRANCH_SHIFT) if level <= TOP_LEVEL else disk.number, page_of(word)):
            return NULL
        level -= 1
        place = (<uint64_t*>(pool.arena.base + <uint64_t>page_of(word) * PAGE_SIZE)
                 + (block >> (level * BRANCH_SHIFT) & (BRANCH_CHILDREN - 1)))
    return place


cdef void _bring_object(Pool pool, uint64_t word) noexcept nogil:
    cdef const uint8_t* first
    cdef int line
    if not CODEC_RAW <= kind_of(word) < CODEC_ZSTD_DICT + CODEC_DICTS or (
            unit_of(word) >= look32(&pool.arena.unit_high)):
        return
    first = pool.store.bytes_at(word)
    for line in range(LINES):
        __builtin_prefetch(first + line * LINE)
