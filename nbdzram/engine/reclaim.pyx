"""Taking back what was freed while readers could still see it (limbo.pxd), for whoever cannot go on without it.

A slot, a handle or a node is freed in two steps: retired under the pool's lock, and taken back under it when a grace
period (quiescence.pyx) is over. Most of that happens by the way. Here are those who ask for it:

    reclaim        a write that found no room, before it is refused; a step of a run, before it tells what it returned;
                   compaction, before it looks at what is used. It waits for a grace period
    reclaim_ripe   whoever asks what is used. It waits for nobody
    keep_short     whoever is about to retire more. It waits while readers are slower than writers

Who waits holds neither the pool's lock nor a stripe. It may hold the maintenance lock, which nobody takes who is
online.
"""

from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.kit cimport gather_next, gather_tallies
from nbdzram.engine.limbo cimport LIMBO_LONG, Limbo, limbo_count, limbo_has_room, limbo_hint, limbo_ripe_to
from nbdzram.engine.lock cimport HOLD, HOLD_PAGES, Lock, lock_leave, lock_take, lock_take_behind
from nbdzram.engine.quiescence cimport grace_begin, grace_wait, quiescent
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables


cdef bint may_retire(ObjectStore store, Tables tables) noexcept nogil:
    """Under the pool's lock: whether what one hold frees finds room. If not, let the locks go and reclaim."""
    return limbo_has_room(&store.slab.limbo, 2 * HOLD) and limbo_has_room(&tables.limbo, 2 * HOLD)


cdef bint reclaim(Lock* lock, ObjectStore store, Tables tables) noexcept nogil:
    """Wait until nobody sees any more what was retired before, and take it back; whether there was anything. What
    threads had at hand to write with is taken back too.

    Behind others: it waits anyhow, and runs, which do this too, would take themselves for clients (Lock.turns).
    """
    cdef Limbo* slots = &store.slab.limbo
    cdef Limbo* handles = &store.cells.limbo
    cdef Limbo* nodes = &tables.limbo
    cdef uint64_t last_slot, last_handle, last_node
    cdef bint anything
    cdef bint gathered = _gather(lock, store)
    lock_take_behind(lock)
    last_slot, last_handle, last_node = slots.last, handles.last, nodes.last
    anything = limbo_count(slots) != 0 or limbo_count(handles) != 0 or limbo_count(nodes) != 0
    lock_leave(lock)
    if not anything:
        return gathered
    grace_wait(grace_begin())
    lock_take_behind(lock)
    limbo_ripe_to(slots, last_slot)
    limbo_ripe_to(handles, last_handle)
    limbo_ripe_to(nodes, last_node)
    while slots.first < last_slot or handles.first < last_handle or nodes.first < last_node:
        _take_back(store, tables)
        lock_leave(lock)
        lock_take_behind(lock)
    lock_leave(lock)
    return True


cdef void reclaim_ripe(Lock* lock, ObjectStore store, Tables tables) noexcept nogil:
    """Take back what nobody sees any more, and what threads had at hand; and let the index fit what is stored."""
    cdef bint going = True
    quiescent()
    _gather(lock, store)
    while going:
        lock_take(lock)
        going = _take_back(store, tables)
        lock_leave(lock)
    fit_index(lock, store)


cdef void fit_index(Lock* lock, ObjectStore store) noexcept nogil:
    """Make the index as large as the objects that were counted ask for."""
    cdef bint going = True
    while going:
        lock_take(lock)
        going = store.index.fit(HOLD)
        lock_leave(lock)


cdef bint _gather(Lock* lock, ObjectStore store) noexcept nogil:
    """Empty the kits of all threads (kit.pyx), one a hold; whether there was anything."""
    cdef uint32_t number = 0
    cdef bint anything = False
    cdef bint going = True
    while going:
        lock_take_behind(lock)
        gather_tallies(lock.sides, store)
        going = gather_next(lock.sides, store, &number)
        lock_leave(lock)
        anything = anything or going
    return anything


cdef void keep_short(Lock* lock, ObjectStore store, Tables tables) noexcept nogil:
    """Before a change of HOLD things: map ahead what it may take, and wait while much is retired, as it retires
    more."""
    quiescent()
    store.arena.make_ready()
    while limbo_hint(&store.slab.limbo) > LIMBO_LONG or limbo_hint(&tables.limbo) > LIMBO_LONG:
        if not reclaim(lock, store, tables):
            return


cdef bint _take_back(ObjectStore store, Tables tables) noexcept nogil:
    """Under the pool's lock: take back what one hold allows; whether there may be more."""
    cdef uint64_t slots = store.slab.reclaim(HOLD_PAGES)
    cdef uint64_t nodes = tables.reclaim(HOLD_PAGES)
    cdef uint64_t handles = store.cells.reclaim(HOLD)
    return slots == HOLD_PAGES or nodes == HOLD_PAGES or handles == HOLD
