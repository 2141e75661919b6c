"""What is derived of the cells of an arena that is opened: holders, free handles, the index, counters. Threads share
that work: a share is a segment of cells.

    handles   1 ......... | ................ | ......... high
              share 0       share 1            share 2
    index     buckets of all of them: objects come, and nobody takes one out meanwhile (Index.adopt)

Invariants
1. A share changes the cells, links, pending and tried bits of its own handles alone, and no two have a byte of those in
   common. Of another's it reads fingerprints, which nobody changes, and links of what is in the index already.
2. What a share counts is its own until all have ended, and is added up in the order of handles: which handles are
   free, and in which order they are taken, does not hang on how many threads there were.
3. Where the arena says already what is to be true, nothing is stored: after a clean end hardly a page of cells changes,
   or is written to a disk.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.cells cimport REFS_MAX, REFS_SHIFT, Cell, length_of
from nbdzram.engine.codec cimport CODEC_LZ4
from nbdzram.engine.publish cimport amend64, publish64

cdef enum:
    AHEAD = 16  # cells: a fetch from memory, page tables and all, takes as long as so many are counted


cdef void adopt_share(ObjectStore store, const uint32_t* holders, Share* share) noexcept nogil:
    """Count the cells of a share; `holders` are those that were found for each handle. There is room for all."""
    cdef uint32_t handle
    cdef Cell* cells = store.cells.cell(share.first) - share.first  # handles of one segment lie in a row
    for handle in range(share.first, share.end):
        if handle + 2 * AHEAD < share.end:
            store.index.prefetch_bucket(cells[handle + 2 * AHEAD].fingerprint)
            store.index.prefetch_chain(cells[handle + AHEAD].fingerprint)
        if holders[handle] == 0:
            _free(store, handle, cells + handle, share)
        else:
            _adopt(store, handle, cells + handle, holders[handle], share)


cdef void _free(ObjectStore store, uint32_t handle, Cell* cell, Share* share) noexcept nogil:
    """Nothing leads to a handle: the next who needs one takes it."""
    if cell.word:
        publish64(&cell.word, 0)
    store.cells.link(handle)[0] = share.free_first
    share.free_first = handle
    if share.free_last == 0:
        share.free_last = handle


cdef void _adopt(ObjectStore store, uint32_t handle, Cell* cell, uint32_t holders, Share* share) noexcept nogil:
    cdef uint64_t word = cell.word << (64 - REFS_SHIFT) >> (64 - REFS_SHIFT)
    share.live += 1
    if holders > REFS_MAX:
        amend64(&cell.word, word)
        store.cells.add_refs(handle, holders)
    elif cell.word != (word | <uint64_t>holders << REFS_SHIFT):
        amend64(&cell.word, word | <uint64_t>holders << REFS_SHIFT)
    if not is_object(word):
        return
    if store.index.adopt(handle, cell.fingerprint):
        share.linked += 1
    else:
        share.pending += 1
    share.objects += 1
    share.bytes_of[kind_of(word)] += length_of(word)
    share.huge += kind_of(word) == CODEC_RAW
    if holders > 1:
        share.shared_objects += 1
        share.shared_bytes += (holders - 1) * <uint64_t>length_of(word)
    if kind_of(word) != CODEC_RAW and kind_of(word) != CODEC_LZ4:
        store.adopt_tried(handle)


cdef void add_share(ObjectStore store, const Share* share) noexcept nogil:
    """What a share counted, after those before it."""
    cdef int kind
    if share.free_first:
        store.cells.link(share.free_last)[0] = store.cells.free_head
        store.cells.free_head = share.free_first
    store.cells.live += share.live
    store.index.linked += share.linked
    store.index.pending_count += share.pending
    store.objects += share.objects
    store.huge_now += share.huge
    for kind in range(KINDS):
        store.bytes_of[kind] += share.bytes_of[kind]
    store.shared_objects += share.shared_objects
    store.shared_bytes += share.shared_bytes
