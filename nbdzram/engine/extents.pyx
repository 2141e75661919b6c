"""What a client is told of an export's blocks: extents of one kind, and which of them share what they hold.

    room_for_twins ──> look_for_twins, again and again ──> find_extents, again and again
                       only where sharing is asked for     the runs so far

Invariants
1. A look is bounded: HOLD entries, or LOOKS words of nodes that lead to none (cursor.pyx); then others have a turn.
2. It shuts out nobody who writes (PoolCore.begin_look): a client may ask without a pause.
3. What is told of a block is how it was at one moment: an entry that was overwritten while its object was looked at is
   looked at again.
4. A block is told to share its object while another block of the export holds it, at that moment: what was seen before
   is only where to look. Else the count of holders would decide, and who overwrites the other block in between would
   learn whether other exports hold the object. For each block so at most four others are looked at.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from nbdzram.engine.blocks cimport HOLE_BIT, SAME_FILLED_BIT, SHARED_BIT, ZERO_BIT, Blocks
from nbdzram.engine.codec cimport BLOCK
from nbdzram.engine.cursor cimport Cursor, entry_now, next_entry
from nbdzram.engine.lock cimport HOLD, lock_step_aside
from nbdzram.engine.must cimport must
from nbdzram.engine.publish cimport look64
from nbdzram.engine.sides cimport Seat
from nbdzram.engine.table cimport LEAF_BLOCKS
from nbdzram.engine.twins cimport (
    Sightings, Twins, key_of_content, twins_add, twins_begin, twins_bytes, twins_end, twins_found, twins_know,
    twins_saw,
)
from nbdzram.engine.users cimport users_enter, users_leave

from nbdzram.errors import EngineError


cdef list list_extents(Blocks disk, uint64_t offset, uint64_t length, size_t limit, uint32_t mask):
    """The first `limit` extents of a range inside the export: pairs of length in bytes and bits. One at least, or else
    who goes on behind the last would not come on. Raises EngineError, MemoryError."""
    cdef Runs runs
    cdef Twins twins
    cdef uint64_t at = offset
    cdef uint64_t end = offset + length
    cdef uint64_t before = <uint64_t>-1
    cdef size_t size = room_for_twins(disk, mask)
    cdef void* memory = malloc(size) if size else NULL
    cdef int error = 0
    memset(&runs, 0, sizeof(Runs))
    runs.limit = limit
    with nogil:
        while at < end and at != before and error == 0:
            before = at
            if size:
                twins_begin(&twins, at // BLOCK, (end + BLOCK - 1) // BLOCK, memory, size if memory != NULL else 0)
                while not look_for_twins(disk, &twins, 1):
                    pass
            if disk.pool.pausing:
                lock_step_aside(&disk.pool.lock, b"who looked for twins")
            error = find_extents(disk, &at, end, mask, <uint64_t>-1, &runs, &twins if size else NULL)
    free(memory)
    try:
        if error:
            raise EngineError(f"cannot look at export {disk.name!r}: {disk._why_gone()}")
        if runs.count == 0 and length:
            raise MemoryError
        return [(runs.pairs[2 * index], runs.pairs[2 * index + 1]) for index in range(runs.count)]
    finally:
        free(runs.pairs)


cdef size_t room_for_twins(Blocks disk, uint32_t mask) noexcept nogil:
    """How much memory one needs to look for what the export's blocks share; 0: nobody has to look, as the mask does not
    ask for that, or the pool tells everything."""
    cdef uint64_t stored
    cdef Seat* seat
    if disk.pool.tells_sharing or not mask & SHARED_BIT:
        return 0
    seat = disk.pool.begin_look()
    stored = look64(&disk.stored)
    disk.pool.end_look(seat)
    return twins_bytes(stored)


cdef bint look_for_twins(Blocks disk, Twins* twins, uint32_t looks) noexcept nogil:
    """Look on, so many times, for the objects that several blocks of a stretch hold. Whether all of it was looked
    through; of an export that is gone there is nothing to look at."""
    cdef Seat* seat
    if not users_enter(&disk.pool.users):
        twins_end(twins)
        return True
    while looks and (twins.end == 0 or twins.next < twins.end):
        looks -= 1
        seat = disk.pool.begin_look()
        if disk.root() == NULL:
            twins_end(twins)
        elif twins.end == 0:
            _seek_twins(disk, twins)
        else:
            _add_twins(disk, twins)
        disk.pool.end_look(seat)
    users_leave(&disk.pool.users)
    return twins.next == twins.end


cdef int find_extents(
    Blocks disk, uint64_t* at, uint64_t end, uint32_t mask, uint64_t looks, Runs* runs, const Twins* twins
) noexcept nogil:
    """Add the runs from `at` to `end` to `runs`, whose `limit` is set, and whose `pairs` the caller frees. 0 or an
    errno value.

    They end where the list is full (and `at` is at the end then), before a block that `twins` do not know, or after so
    many `looks`. `twins`: NULL where nothing is asked of SHARED, or everything may be told (see room_for_twins).
    """
    cdef bint gone = False
    cdef bint more = True
    cdef Seat* seat
    if twins == NULL and not disk.pool.tells_sharing:  # any more, if it is asked for: what others share is not told
        mask &= ~<uint32_t>SHARED_BIT
    if not users_enter(&disk.pool.users):
        return EIO
    if runs.limit == 0:
        at[0] = end
    while at[0] < end and looks and more and not gone and _has_room(runs):
        looks -= 1
        seat = disk.pool.begin_look()
        if disk.root() == NULL:
            gone = True
        else:
            more = _add_extents(disk, at, end, mask, runs, twins)
        disk.pool.end_look(seat)
    users_leave(&disk.pool.users)
    return EIO if gone else 0


# -- a look at the table -----------------------------------------------------------------------------------------------


cdef void _seek_twins(Blocks disk, Twins* twins) noexcept nogil:
    """Within a look: pass holes by."""
    cdef Cursor cursor
    cursor.next, cursor.end = twins.next, twins.until
    if disk.walk(&cursor):
        twins_found(twins, cursor.next)
    elif cursor.next == cursor.end:
        twins_end(twins)
    else:
        twins.next = cursor.next


cdef void _add_twins(Blocks disk, Twins* twins) noexcept nogil:
    """Within a look: the next blocks of the stretch."""
    cdef Cursor cursor
    cdef uint64_t block, entry
    cdef uint32_t handle
    cursor.next, cursor.end = twins.next, twins.end
    if disk.walk(&cursor):
        while next_entry(&cursor, &block, &entry):
            handle = disk.pool.tables.handle_at(entry, block)
            if handle:
                twins_add(twins, block, disk.pool.store.resolve(handle), disk.pool.store.cells.cell(handle).fingerprint)
    twins.next = cursor.next


cdef bint _add_extents(
    Blocks disk, uint64_t* at, uint64_t end, uint32_t mask, Runs* runs, const Twins* twins
) noexcept nogil:
    """Within a look: add the runs from `at` on that it gets to, at most HOLD of them, and move `at` there; to the end
    when the list is full. False: before a block that `twins` do not know, unless it is the first (it was stored after
    one had looked)."""
    cdef Cursor cursor
    cdef uint64_t first = at[0] // BLOCK
    cdef uint64_t block, entry, stop
    cdef bint found, shared
    cdef const Twins* asked = twins if mask & SHARED_BIT else NULL
    cursor.next, cursor.end = first, (end + BLOCK - 1) // BLOCK
    found = disk.walk(&cursor)
    if cursor.next > first:
        stop = min(cursor.next * BLOCK, end)
        if not _add_run(runs, stop - at[0], (HOLE_BIT | ZERO_BIT) & mask):
            at[0] = end
            return True
        at[0] = stop
    if not found:
        return True
    if twins != NULL and runs.count and not twins_know(twins, cursor.next):
        return False
    shared = disk.pool.tables.leaf_is_shared(disk.root(), cursor.next)
    while next_entry(&cursor, &block, &entry):
        stop = min((block + 1) * BLOCK, end)
        if not _add_run(runs, stop - at[0], _told_of(disk, &cursor, block, entry, shared, asked) & mask):
            at[0] = end
            return True
        at[0] = stop
    return True


cdef uint32_t _told_of(
    Blocks disk, const Cursor* cursor, uint64_t block, uint64_t entry, bint leaf_shared, const Twins* twins
) noexcept nogil:
    """Within a look: what a client is told of a block, as it is at one moment."""
    cdef uint32_t bits
    cdef uint64_t now
    if disk.pool.pausing:
        lock_step_aside(&disk.pool.lock, b"who looks behind an entry")
    bits = _told_bits(disk, cursor, block, entry, leaf_shared, twins)
    now = entry_now(cursor, block)
    while now != entry:
        entry = now
        bits = _told_bits(disk, cursor, block, entry, leaf_shared, twins)
        now = entry_now(cursor, block)
    return bits


cdef uint32_t _told_bits(
    Blocks disk, const Cursor* cursor, uint64_t block, uint64_t entry, bint leaf_shared, const Twins* twins
) noexcept nogil:
    """What an entry says; `twins` NULL: everything, else of sharing what is within the export."""
    cdef uint32_t bits = disk.kind_bits(entry, block, leaf_shared)
    cdef uint32_t handle
    if twins == NULL:
        return bits
    handle = disk.pool.tables.handle_at(entry, block)
    if handle != 0 and not bits & SAME_FILLED_BIT and (
            _has_twin(disk, cursor, block, disk.pool.store.resolve(handle), twins)):
        return bits | SHARED_BIT
    return bits & ~<uint32_t>SHARED_BIT


cdef bint _has_twin(
    Blocks disk, const Cursor* cursor, uint64_t block, uint32_t handle, const Twins* twins
) noexcept nogil:
    """Within a look: whether another block than this one holds an object."""
    cdef uint32_t content = key_of_content(disk.pool.store.cells.cell(handle).fingerprint)
    return (_holds_another(disk, cursor, block, handle, twins, &twins.objects, handle)
            or _holds_another(disk, cursor, block, handle, twins, &twins.contents, content))


cdef bint _holds_another(
    Blocks disk, const Cursor* cursor, uint64_t block, uint32_t handle, const Twins* twins, const Sightings* sightings,
    uint32_t key
) noexcept nogil:
    """Whether one of the blocks does where the key was seen."""
    cdef uint64_t first, last
    return twins_saw(twins, sightings, key, &first, &last) and (
        first != block and _holds(disk, cursor, block, first, handle)
        or last != block and _holds(disk, cursor, block, last, handle))


cdef bint _holds(Blocks disk, const Cursor* cursor, uint64_t block, uint64_t other, uint32_t handle) noexcept nogil:
    """Within a look that is at a block: whether another block holds an object now."""
    cdef const uint64_t* leaf = cursor.leaf
    cdef uint32_t found
    if other // LEAF_BLOCKS != block // LEAF_BLOCKS:
        leaf = disk.pool.tables.leaf(disk.root(), other)
    found = 0 if leaf == NULL else disk.pool.tables.handle_at(look64(leaf + other % LEAF_BLOCKS), other)
    return found != 0 and disk.pool.store.resolve(found) == handle


# -- a list of runs ----------------------------------------------------------------------------------------------------


cdef bint _has_room(Runs* runs) noexcept nogil:
    """Make room for what one hold of the lock adds. Without memory the list ends where it is."""
    cdef uint64_t* grown
    cdef size_t room = min(runs.limit, max(runs.room * 2, <size_t>4 * HOLD))
    if runs.room >= min(runs.limit, runs.count + HOLD + 2):
        return True
    grown = <uint64_t*>realloc(runs.pairs, room * 2 * sizeof(uint64_t))
    if grown == NULL:
        return False
    runs.pairs = grown
    runs.room = room
    return True


cdef bint _add_run(Runs* runs, uint64_t length, uint32_t bits) noexcept nogil:
    """Add a run, to the last one if it is of its kind. False when the list is full."""
    if runs.count and runs.pairs[2 * runs.count - 1] == bits:
        runs.pairs[2 * runs.count - 2] += length
        return True
    if runs.count == runs.limit:
        return False
    must(runs.count < runs.room, b"there is room for what one hold of the lock adds")
    runs.pairs[2 * runs.count] = length
    runs.pairs[2 * runs.count + 1] = bits
    runs.count += 1
    return True
