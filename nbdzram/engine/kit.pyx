"""What a thread has at hand to write with, so that threads that write need nothing of each other's.

    pool ──────────── handles, slots, a few at a time ───────────────> kit ── an object is stored ──> cell, slot
      <── what is more than it keeps ── nobody sees it any more ── gone <── the last entry left ────────┘

A thread that overwrites needs as many handles and slots as it lets go, of the same sizes mostly: they go in a circle
between its kit and the pool's objects, and nothing of the slab (slab.pyx), of the list of free handles (cells.pyx) or
of a counter is touched. What does not balance is fetched or given back KIT_FETCH at a time, under one small lock: the
*depot*.

What a kit has, to everybody else
    handles    free cells, and live only once they are used: opening an arena finds them free, and a check misses none
    slots      in use, as the slab has it, and no object's. They count as used
    gone       retired as the pool's own are (limbo.pxd): the same rules, grace periods of its own
    tallies    what the thread added to the pool's counters, which are what they should be when all tallies are added up

Invariants
1. A kit is its thread's alone, on the shared side of the pool's lock; whoever has that lock alone may do anything with
   it.
2. Who asks what is used, or cannot go on without it, has all kits emptied first (gather_next): so where nobody writes
   at that moment, counters, sums and the limit are as exact as without kits. So has a check, beside which kits stay
   empty.
3. Nothing is fetched near the pool's limit (beside.pyx): there every page is given out by whoever has the lock alone.
4. No slot is kept in a zspage that compaction empties.
5. A page is taken when a slot is needed that has none, and no further one to fill a kit.

The depot's lock is taken on the shared side, so beside it stand only others that write; inside it there is no other
lock.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from nbdzram.engine.limbo cimport limbo_count, limbo_has_room, limbo_one_less, limbo_one_more, limbo_ripen
from nbdzram.engine.lock cimport HOLD, HOLD_PAGES, lock_leave, lock_take
from nbdzram.engine.must cimport must, must_debug
from nbdzram.engine.prefetch cimport prefetch_to_write
from nbdzram.engine.quiescence cimport thread_number
from nbdzram.engine.sides cimport SEATS, Seat, Sides, sides_give, sides_high, sides_seat
from nbdzram.engine.slab cimport RELEASED, retired_slot, retired_unit
from nbdzram.engine.store cimport KINDS, ObjectStore

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void**, size_t alignment, size_t size)

cdef enum:
    LINE = 64    # bytes
    APART = 128  # bytes: two lines, which processors fetch in pairs

assert sizeof(Seat) + 120 == APART


cdef Kit* kit_of_thread(Sides* sides) noexcept nogil:
    """The thread's kit in this pool. NULL: there are too many threads, or no memory; it writes alone."""
    return <Kit*>seat_of_thread(sides)


cdef Seat* seat_of_thread(Sides* sides) noexcept nogil:
    """The same, for whoever needs only its seat."""
    cdef uint32_t number = thread_number()
    cdef Seat* seat
    cdef void* place
    if number >= SEATS:
        return NULL
    seat = sides_seat(sides, number)
    if seat == NULL:
        if posix_memalign(&place, APART, sizeof(Kit)):
            return NULL
        memset(place, 0, sizeof(Kit))
        seat = <Seat*>place
        sides_give(sides, number, seat)
    return seat


cdef void kits_free(Sides* sides) noexcept nogil:
    """The end of the pool, which has no users."""
    cdef uint32_t number
    for number in range(sides_high(sides)):
        free(sides_seat(sides, number))


# -- for its thread, beside others -----------------------------------------------------------------------------------


cdef bint has_handle(Kit* kit, ObjectStore store) noexcept nogil:
    """Have a handle at hand, for which there is room in the index. False when there is none."""
    cdef uint32_t count
    if kit.handle_count == 0:
        lock_take(&store.depot)
        count = store.cells.hand_out(KIT_FETCH, kit.handles)
        while kit.handle_count < count and store.index.reserve(kit.handles[kit.handle_count]):
            kit.handle_count += 1
        while count > kit.handle_count:
            count -= 1
            store.cells.take_back(kit.handles[count])
        lock_leave(&store.depot)
    return kit.handle_count != 0


cdef bint has_slot(Kit* kit, ObjectStore store, int size_class) noexcept nogil:
    """Have a slot of a size class at hand. False at the limit, or without memory.

    What went is looked through before, once enough did: who looked for each slot would never have more than the one
    that it let go last, and look for ever.
    """
    if kit.slot_count[size_class] == 0 and _may_look(kit) and limbo_ripen(&kit.limbo):
        _keep_or_give(kit, store)
    if kit.slot_count[size_class] == 0:
        lock_take(&store.depot)
        kit.slot_count[size_class] = store.slab.hand_out(size_class, KIT_FETCH, kit.slots[size_class])
        lock_leave(&store.depot)
        kit.bytes += <uint64_t>kit.slot_count[size_class] * store.slab.classes[size_class].size
    return kit.slot_count[size_class] != 0


cdef void expect_slot(Kit* kit, ObjectStore store, int size_class) noexcept nogil:
    """A slot of this size class was used: the next object is as large, mostly, and takes the next one."""
    cdef uint64_t slot
    kit.expected = NULL
    kit.expected_size = store.slab.slot_size[size_class]
    if kit.slot_count[size_class]:
        slot = kit.slots[size_class][kit.slot_count[size_class] - 1]
        kit.expected = store.arena.base + store.slab.offset_of(
            retired_unit(slot), retired_slot(slot), kit.expected_size)


cdef void bring_slot(Kit* kit) noexcept nogil:
    """Have memory bring the expected slot, while what will lie in it is made. Needs no lock, and promises nothing."""
    cdef uint32_t at = 0
    if kit.expected != NULL:
        while at < kit.expected_size:
            prefetch_to_write(kit.expected + at)
            at += LINE


cdef bint has_room(Kit* kit, ObjectStore store, uint32_t count) noexcept nogil:
    """Have room for so many objects that go; what nobody sees any more is at hand again. False: readers are slow."""
    must_debug(count <= KIT_GONE, b"what goes at once finds room in a kit")
    if limbo_count(&kit.limbo) >= KIT_FEW and kit.limbo.first == kit.limbo.ripe and _may_look(kit):
        limbo_ripen(&kit.limbo)
    if kit.limbo.first < kit.limbo.ripe:
        _keep_or_give(kit, store)
    if limbo_count(&kit.limbo) + count > KIT_GONE:
        lock_take(&store.depot)
        _hand_over(kit, store)
        lock_leave(&store.depot)
    return limbo_count(&kit.limbo) + count <= KIT_GONE


cdef void let_go(Kit* kit, ObjectStore store, uint64_t slot, uint32_t handle, uint32_t size_class) noexcept nogil:
    """Nothing leads to an object any more, and its cell is free."""
    cdef Gone* gone = &kit.gone[kit.limbo.last & (KIT_GONE - 1)]
    must(limbo_count(&kit.limbo) < KIT_GONE, b"who lets objects go looks for room first")
    gone.slot = slot
    gone.handle = handle
    gone.size_class = size_class
    limbo_one_more(&kit.limbo)


cdef bint outgrows(Kit* kit, ObjectStore store) noexcept nogil:
    """Whether the thread has stored so many objects, or let go, that the index no longer fits what it has."""
    cdef bint outgrown
    if kit.tallies.linked + KIT_OWES <= 2 * KIT_OWES:  # modulo 2^64: no more and no fewer
        return False
    lock_take(&store.depot)
    _add_up(kit, store)
    outgrown = not store.index.fits()
    lock_leave(&store.depot)
    return outgrown


cdef bint _may_look(Kit* kit) noexcept nogil:
    """Whether enough went since it was last looked whether nobody sees it any more; then whoever asks looks."""
    if kit.limbo.last - kit.looked_at < KIT_LOOKS_EVERY:
        return False
    kit.looked_at = kit.limbo.last
    return True


cdef void _keep_or_give(Kit* kit, ObjectStore store) noexcept nogil:
    """Take into the kit what nobody sees any more; what it has enough of goes to the pool."""
    cdef Gone* gone
    cdef Gone given[KIT_GONE]
    cdef uint32_t count = 0, index
    while kit.limbo.first < kit.limbo.ripe:
        gone = &kit.gone[kit.limbo.first & (KIT_GONE - 1)]
        limbo_one_less(&kit.limbo)
        given[count] = gone[0]
        if _keeps_slot(kit, store, gone):
            kit.slots[gone.size_class][kit.slot_count[gone.size_class]] = gone.slot
            kit.slot_count[gone.size_class] += 1
            kit.bytes += store.slab.classes[gone.size_class].size
            given[count].slot = 0
        if kit.handle_count < KIT_HANDLES:
            kit.handles[kit.handle_count] = gone.handle
            kit.handle_count += 1
            given[count].handle = 0
        count += given[count].slot != 0 or given[count].handle != 0
    if count == 0:
        return
    lock_take(&store.depot)
    for index in range(count):
        if given[index].slot:
            store.slab.take_back(given[index].slot)
            _give_slots(kit, store, given[index].size_class, KIT_SLOTS - KIT_FETCH)
        if given[index].handle:
            store.cells.take_back(given[index].handle)
            _give_handles(kit, store, KIT_HANDLES - KIT_FETCH)
    lock_leave(&store.depot)


cdef bint _keeps_slot(Kit* kit, ObjectStore store, const Gone* gone) noexcept nogil:
    return (kit.slot_count[gone.size_class] < KIT_SLOTS
            and kit.bytes + store.slab.classes[gone.size_class].size <= KIT_BYTES
            and not store.slab.is_emptied(gone.size_class, retired_unit(gone.slot)))


# -- under the depot's lock, or alone --------------------------------------------------------------------------------


cdef void _give_slots(Kit* kit, ObjectStore store, uint32_t size_class, uint32_t kept) noexcept nogil:
    """Keep so many slots of a size class."""
    while kit.slot_count[size_class] > kept:
        kit.slot_count[size_class] -= 1
        kit.bytes -= store.slab.classes[size_class].size
        store.slab.take_back(kit.slots[size_class][kit.slot_count[size_class]])


cdef void _give_handles(Kit* kit, ObjectStore store, uint32_t kept) noexcept nogil:
    while kit.handle_count > kept:
        kit.handle_count -= 1
        store.cells.take_back(kit.handles[kit.handle_count])


cdef void _hand_over(Kit* kit, ObjectStore store) noexcept nogil:
    """Let the pool wait for what may still be seen, as far as it has room."""
    cdef Gone* gone
    while limbo_count(&kit.limbo) and limbo_has_room(&store.slab.limbo, 4 * HOLD):
        gone = &kit.gone[kit.limbo.first & (KIT_GONE - 1)]
        if kit.limbo.ripe == kit.limbo.first:
            kit.limbo.ripe += 1
        limbo_one_less(&kit.limbo)
        store.slab.retire_later(retired_unit(gone.slot), retired_slot(gone.slot), RELEASED)
        store.cells.retire_later(gone.handle)
    kit.limbo.waiting = max(kit.limbo.waiting, kit.limbo.ripe)


# -- for whoever has the pool's lock alone ---------------------------------------------------------------------------


cdef bint gather_next(Sides* sides, ObjectStore store, uint32_t* number) noexcept nogil:
    """Empty the next kit, from number[0] on, that has anything; False: there is none. One a hold: some 30 us.

    What may still be seen is the pool's to wait for; while that has no room, it stays.
    """
    cdef Kit* kit
    while number[0] < sides_high(sides):
        kit = <Kit*>sides_seat(sides, number[0])
        if kit != NULL and not _is_empty(kit):
            number[0] += _gather(kit, store)
            return True
        number[0] += 1
    return False


cdef bint _gather(Kit* kit, ObjectStore store) noexcept nogil:
    """Whether it is done with; False: as many pages went back as one hold may give."""
    cdef int size_class
    cdef uint64_t pages = store.slab.pages_used
    must_debug(store.slab.census is None, b"kits are empty beside a check that counts")
    _add_up(kit, store)
    for size_class in range(store.slab.class_count):
        while kit.slot_count[size_class]:
            if pages >= store.slab.pages_used + HOLD_PAGES:
                return False
            _give_slots(kit, store, size_class, kit.slot_count[size_class] - 1)
    _give_handles(kit, store, 0)
    _hand_over(kit, store)
    must_debug(kit.bytes == 0, b"a kit without slots has no bytes")
    return True


cdef void gather_slots(Sides* sides, ObjectStore store, int size_class) noexcept nogil:
    """Take the slots of one size class out of all kits."""
    cdef uint32_t number
    for number in range(sides_high(sides)):
        if sides_seat(sides, number) != NULL:
            _give_slots(<Kit*>sides_seat(sides, number), store, size_class, 0)


cdef void gather_tallies(Sides* sides, ObjectStore store) noexcept nogil:
    """Let the pool's counters be what they should."""
    cdef uint32_t number
    for number in range(sides_high(sides)):
        if sides_seat(sides, number) != NULL:
            _add_up(<Kit*>sides_seat(sides, number), store)


cdef bint are_empty(Sides* sides) noexcept nogil:
    cdef uint32_t number
    for number in range(sides_high(sides)):
        if sides_seat(sides, number) != NULL and not _is_empty(<Kit*>sides_seat(sides, number)):
            return False
    return True


cdef bint _is_empty(Kit* kit) noexcept nogil:
    """Whether it has nothing but tallies."""
    return kit.handle_count == 0 and kit.bytes == 0 and limbo_count(&kit.limbo) == 0


cdef void _add_up(Kit* kit, ObjectStore store) noexcept nogil:
    cdef Tallies* tallies = &kit.tallies
    cdef int kind
    for kind in range(KINDS):
        store.bytes_of[kind] += tallies.bytes_of[kind]
    store.objects += tallies.objects
    store.huge_now += tallies.huge_now
    store.huge_ever += tallies.huge_ever
    store.shared_objects += tallies.shared_objects
    store.shared_bytes += tallies.shared_bytes
    store.tried_bytes += tallies.tried_bytes
    store.cells.live += tallies.live
    store.index.linked += tallies.linked
    store.index.pending_count += tallies.pending
    store.slab.freed_ever += tallies.freed_ever
    memset(tallies, 0, sizeof(Tallies))
