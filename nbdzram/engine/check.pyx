"""Holding the engine against its own invariants (DESIGN.md section 4, rule 9).

check_pool recounts everything that is derived, under the lock: for tests, and for the end of a Check. Check decodes
every object and compares its fingerprint, in steps, while clients go on.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import gc

from nbdzram.engine.arena cimport UNIT_PAGES
from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, Cells, kind_of, length_of, slot_of, target_of, unit_of
from nbdzram.engine.codec cimport BLOCK, CODEC_FREE, CODEC_RAW, fingerprint
from nbdzram.engine.index cimport Index
from nbdzram.engine.pool cimport (
    ENTRY_LIVE, EXPORTS_MAX, Pool, lock_leave, lock_take, lock_take_behind, pthread_mutex_lock, pthread_mutex_unlock,
)
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport BRANCH_CHILDREN, LEAF_BLOCKS, TOP_LEVEL, Tables, entry_handle

from nbdzram.errors import CheckFailed


@cython.final
cdef class Check:
    """See check.pyi."""

    cdef Pool pool
    cdef uint32_t position
    cdef uint32_t end
    cdef uint64_t checked

    def __cinit__(self, Pool pool):
        self.pool = pool
        self.position = 1
        lock_take(&pool.lock)
        self.end = pool.store.cells.high
        lock_leave(&pool.lock)

    def step(self, uint32_t budget = 4096) -> bool:
        cdef uint32_t wrong = 0
        cdef uint32_t last = <uint32_t>min(<uint64_t>self.position + budget, self.end)
        with nogil:
            pthread_mutex_lock(&self.pool.maintenance)
            while self.position < last and wrong == 0:
                if not self._visit(self.position):
                    wrong = self.position
                self.position += 1
            pthread_mutex_unlock(&self.pool.maintenance)
        if wrong:
            raise CheckFailed(f"the object of handle {wrong} does not decode to the block whose fingerprint it has")
        if self.position < self.end:
            return True
        check_pool(self.pool)
        return False

    @property
    def done(self):
        return self.position - 1

    @property
    def total(self):
        return self.end - 1

    def report(self):
        return {"objects_checked": self.checked}

    cdef bint _visit(self, uint32_t handle) noexcept nogil:
        cdef uint8_t encoded[BLOCK]
        cdef uint8_t block[BLOCK]
        cdef uint64_t word, expected
        lock_take_behind(&self.pool.lock)
        word = self.pool.store.cells.cell(handle).word
        expected = self.pool.store.cells.cell(handle).fingerprint
        if kind_of(word) == CODEC_FREE or kind_of(word) == KIND_FILL or kind_of(word) == KIND_FORWARD:
            lock_leave(&self.pool.lock)
            return True
        memcpy(encoded, self.pool.store.bytes_at(word), length_of(word))
        lock_leave(&self.pool.lock)
        self.checked += 1
        return (self.pool.store.decode(kind_of(word), encoded, length_of(word), block)
                and fingerprint(block, self.pool.seed) & self.pool.fingerprint_mask == expected)


cdef class _Recount:
    """What a walk over the tables and cells finds, to be compared with what is kept."""

    cdef Pool pool
    cdef uint32_t* holders  # by handle
    cdef uint32_t* parents  # by page
    cdef uint64_t nodes

    def __cinit__(self, Pool pool):
        self.pool = pool
        self.holders = <uint32_t*>calloc(<uint64_t>pool.store.cells.high + 1, sizeof(uint32_t))
        self.parents = <uint32_t*>calloc(<uint64_t>pool.arena.unit_high * UNIT_PAGES + 1, sizeof(uint32_t))
        if self.holders == NULL or self.parents == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.holders)
        free(self.parents)

    cdef str walk(self, uint32_t page, int level):
        """Count what a node names; the complaint, or None."""
        cdef int index
        cdef uint32_t handle
        cdef Tables tables = self.pool.tables
        cdef Cells cells = self.pool.store.cells
        if page == 0:
            return None
        if page >= self.pool.arena.unit_high * UNIT_PAGES:
            return f"page {page} of a block table lies behind the arena's end"
        self.parents[page] += 1
        if self.parents[page] > 1:
            return None
        self.nodes += 1
        for index in range(BRANCH_CHILDREN if level else LEAF_BLOCKS):
            if level:
                complaint = self.walk(tables.branch(page)[index], level - 1)
                if complaint:
                    return complaint
                continue
            handle = entry_handle(tables.entries(page)[index])
            while handle:
                if handle >= cells.high or kind_of(cells.cell(handle).word) == CODEC_FREE:
                    return f"a block leads to handle {handle}, which is free"
                self.holders[handle] += 1
                handle = target_of(cells.cell(handle).word) if kind_of(cells.cell(handle).word) == KIND_FORWARD else 0
        return None


def check_pool(Pool pool) -> None:
    """Hold every derived count against a recount. Raises CheckFailed. Takes the lock throughout.

    The interpreter lock is kept as well: a finalizer that ran in between could give it away, so none may.
    """
    collecting = gc.isenabled()
    gc.disable()
    lock_take(&pool.lock)
    try:
        pool.store.slab.check()
        _check_tables(pool)
        _check_index(pool)
    finally:
        lock_leave(&pool.lock)
        if collecting:
            gc.enable()


def _check_tables(Pool pool):
    cdef Tables tables = pool.tables
    cdef uint32_t number, page
    cdef uint64_t stored, same, all_stored = 0, all_same = 0
    cdef _Recount found = _Recount(pool)
    by_number = {disk.number: disk for disk in pool._disks}
    for number in range(EXPORTS_MAX):
        if pool.export_entry(number).state != ENTRY_LIVE:
            continue
        complaint = found.walk(pool.export_entry(number).root, TOP_LEVEL)
        if complaint:
            raise CheckFailed(complaint)
        stored = same = 0
        tables.count(pool.export_entry(number).root, TOP_LEVEL, &stored, &same)
        if by_number[number]._counts() != (stored, same):
            raise CheckFailed(f"export {by_number[number].name!r} counts {by_number[number]._counts()} blocks stored "
                              f"and same-filled, {(stored, same)} found")
        all_stored += stored
        all_same += same
    if (all_stored, all_same) != (pool.blocks_stored, pool.blocks_same):
        raise CheckFailed(f"{(pool.blocks_stored, pool.blocks_same)} blocks counted, {(all_stored, all_same)} found")
    if found.nodes != tables.nodes:
        raise CheckFailed(f"{tables.nodes} nodes counted, {found.nodes} found")
    for page in range(pool.arena.unit_high * UNIT_PAGES):
        if found.parents[page] and found.parents[page] != (<uint32_t*>tables.refs.base)[page]:
            raise CheckFailed(f"node {page}: {(<uint32_t*>tables.refs.base)[page]} parents counted, "
                              f"{found.parents[page]} found")
    _check_cells(pool, found)


def _check_cells(Pool pool, _Recount found):
    cdef ObjectStore store = pool.store
    cdef uint32_t handle
    cdef uint64_t word, refs
    cdef uint64_t live = 0, objects = 0, shared = 0, shared_bytes = 0, huge = 0, slots = 0
    cdef int index
    by_codec = [0] * 16
    places = set()
    for handle in range(1, store.cells.high):
        word = store.cells.cell(handle).word
        if kind_of(word) == CODEC_FREE:
            if found.holders[handle]:
                raise CheckFailed(f"handle {handle} is free and has {found.holders[handle]} holders")
            continue
        live += 1
        refs = store.cells.refs(handle)
        if refs != found.holders[handle] or refs == 0:
            raise CheckFailed(f"handle {handle}: {refs} holders counted, {found.holders[handle]} found")
        if kind_of(word) == KIND_FILL or kind_of(word) == KIND_FORWARD:
            continue
        objects += 1
        by_codec[kind_of(word)] += length_of(word)
        huge += kind_of(word) == CODEC_RAW
        shared += refs > 1
        shared_bytes += (refs - 1) * length_of(word)
        places.add((unit_of(word), slot_of(word)))
    for index in range(store.slab.class_count):
        slots += store.slab.classes[index].used
    kept = (store.cells.live, store.objects, store.objects, slots, store.shared_objects, store.shared_bytes,
            store.huge_now, [store.bytes_of[index] for index in range(8)])
    recounted = (live, objects, <uint64_t>len(places), objects, shared, shared_bytes, huge, by_codec[:8])
    if kept != recounted:
        raise CheckFailed(f"handles, objects, places, slots, shared, shared bytes, huge, bytes by codec: {kept} counted, "
                          f"{recounted} found")


def _check_index(Pool pool):
    cdef Index index = pool.store.index
    cdef Cells cells = pool.store.cells
    cdef uint32_t handle, bucket
    cdef uint64_t linked = 0, pending = 0
    for bucket in range(index.buckets):
        handle = (<uint32_t*>index.heads.base)[bucket]
        while handle:
            linked += 1
            if index.is_pending(handle) or index._head(cells.cell(handle).fingerprint) != (
                    <uint32_t*>index.heads.base + bucket):
                raise CheckFailed(f"object {handle} stands wrongly in bucket {bucket} of the index")
            if linked > index.linked:
                raise CheckFailed(f"the index has more than its {index.linked} objects, or a chain that turns in a ring")
            handle = cells.link(handle)[0]
    handle = index.next_pending(1)
    while handle:
        pending += 1
        if kind_of(cells.cell(handle).word) in (CODEC_FREE, KIND_FILL, KIND_FORWARD):
            raise CheckFailed(f"handle {handle} is pending and no object")
        handle = index.next_pending(handle + 1)
    if (linked, pending) != (index.linked, index.pending_count) or linked + pending != pool.store.objects:
        raise CheckFailed(f"{index.linked} linked and {index.pending_count} pending of {pool.store.objects} objects "
                          f"counted, {linked} and {pending} found")
