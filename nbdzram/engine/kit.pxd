from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.limbo cimport Limbo
from nbdzram.engine.sides cimport Seat, Sides
from nbdzram.engine.slab cimport MAX_CLASSES
from nbdzram.engine.store cimport KINDS, ObjectStore

cdef enum:
    KIT_HANDLES = 128    # at hand at most
    KIT_SLOTS = 16       # of one size class
    KIT_BYTES = 1 << 20  # of all slots, a few of each of sixty classes: what a thread may keep from others of a pool
                         # that is not near its limit
    KIT_GONE = 128       # objects that went and may still be seen; a power of two
    KIT_FEW = 32         # of them are left alone: to look whether nobody sees them takes a line of each thread
    KIT_LOOKS_EVERY = 16 # that went
    KIT_FETCH = 8        # handles or slots fetched at a time: a run of blocks (prepare.pxd)
    KIT_OWES = 64        # objects more or fewer in the index, before it is looked whether its buckets fit

cdef struct Gone:
    # An object that nothing leads to any more.
    uint64_t slot        # retired_word
    uint32_t handle
    uint32_t size_class

cdef struct Tallies:
    # What is to be added to the counters of the same names: modulo 2^64, as some become less.
    uint64_t bytes_of[KINDS]
    uint64_t objects, huge_now, huge_ever, shared_objects, shared_bytes, live, linked, pending, tried_bytes, freed_ever

cdef struct Kit:
    Seat seat
    char apart[120]      # `seat` is looked at by others
    Limbo limbo          # of `gone`
    uint64_t looked_at   # limbo.last, when it was last looked whether a grace period ended
    uint64_t bytes       # of all slots at hand
    const uint8_t* expected  # slot, of the thread's next object: its alone, in the lock and out of it; NULL: none
    uint32_t expected_size
    uint32_t handle_count
    uint8_t slot_count[MAX_CLASSES]
    uint32_t handles[KIT_HANDLES]
    Tallies tallies
    Gone gone[KIT_GONE]
    uint64_t slots[MAX_CLASSES][KIT_SLOTS]  # retired_word

cdef Seat* seat_of_thread(Sides* sides) noexcept nogil
cdef Kit* kit_of_thread(Sides* sides) noexcept nogil
cdef void kits_free(Sides* sides) noexcept nogil
cdef bint has_handle(Kit* kit, ObjectStore store) noexcept nogil
cdef bint has_slot(Kit* kit, ObjectStore store, int size_class) noexcept nogil
cdef void expect_slot(Kit* kit, ObjectStore store, int size_class) noexcept nogil
cdef void bring_slot(Kit* kit) noexcept nogil
cdef bint has_room(Kit* kit, ObjectStore store, uint32_t count) noexcept nogil
cdef void let_go(Kit* kit, ObjectStore store, uint64_t slot, uint32_t handle, uint32_t size_class) noexcept nogil
cdef bint outgrows(Kit* kit, ObjectStore store) noexcept nogil
cdef void gather_tallies(Sides* sides, ObjectStore store) noexcept nogil
cdef bint gather_next(Sides* sides, ObjectStore store, uint32_t* number) noexcept nogil
cdef void gather_slots(Sides* sides, ObjectStore store, int size_class) noexcept nogil
cdef bint are_empty(Sides* sides) noexcept nogil
