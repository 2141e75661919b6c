"""Size classes and zspages: where an object's bytes lie.

What it owns: units of the arena, each carved into equal slots of one size class. All of this module's state is
derived: it is rebuilt (adopt) from the handle cells when an arena is opened again.

    zspage = unit of 64 KiB, of which its class uses the first `pages` pages

    | slot 0 | slot 1 | ... | slot top-1 |  never used since it was made  |  tail  |
      used     free           used         not resident, not counted

Size classes follow zsmalloc (mm/zsmalloc.c): steps of 16 bytes, the chain of pages that wastes least, and classes that
come out with the same pages and slots are one. The chain may be 16 pages (the kernel's limit is a setting, 8 by
default), as an unused page of a zspage costs nothing here: a page counts from the moment its first slot is used.

Invariants
1. pages_used counts every page up to `top` of every zspage, and no other page of a zspage is resident.
2. A zspage with a free slot, unless compaction empties it, stands in the list of its fullness group; allocation takes
   from the fullest group, and reuses freed slots before it touches new ones.
3. A zspage without objects does not exist: its pages went back to the system when the last object left.

Not locked here: the pool's lock covers every call.
"""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from nbdzram.engine.arena cimport (
    PAGE_SIZE, UNIT_PAGES, UNIT_SIZE, Arena, region_ensure, region_free, region_reserve,
)

import zlib

from nbdzram.errors import ArenaError


@cython.final
cdef class Slab:
    """Slots of an arena. mem_limit is held in pages; 0 is none."""

    def __cinit__(self, Arena arena):
        self.arena = arena
        if not region_reserve(&self.zspages, (arena.reserved // UNIT_SIZE) * sizeof(ZSpage)):
            raise ArenaError("cannot reserve addresses for zspage descriptors; raise ulimit -v")
        self._make_classes()

    def __dealloc__(self):
        region_free(&self.zspages)
        region_free(&self.adopted)

    def _make_classes(self):
        """From the largest class down, as zs_create_pool does, so that a merged class has the larger size."""
        cdef int klass = -1
        cdef int length
        for size in range(PAGE_SIZE, MIN_SIZE - 1, -SIZE_STEP):
            # The least waste, and of equals the longest: fewer zspages to keep.
            pages = min(range(1, UNIT_PAGES + 1), key=lambda n: ((n * PAGE_SIZE % size) / (n * PAGE_SIZE), -n))
            slots = pages * PAGE_SIZE // size
            if klass < 0 or (self.classes[klass].pages, self.classes[klass].slots) != (pages, slots):
                klass += 1
                assert klass < MAX_CLASSES
                memset(&self.classes[klass], 0, sizeof(SizeClass))
                self.classes[klass].size = size
                self.classes[klass].pages = pages
                self.classes[klass].slots = slots
            for length in range(size - SIZE_STEP + 1, size + 1):
                self.class_of[length] = klass
        for length in range(MIN_SIZE):
            self.class_of[length] = klass
        self.class_count = klass + 1

    def layout(self) -> int:
        """A number for the size classes: they give a stored slot number its meaning, so an arena remembers it."""
        text = ";".join(f"{self.classes[i].size},{self.classes[i].slots}" for i in range(self.class_count))
        return zlib.crc32(text.encode())

    cdef ZSpage* zspage(self, uint32_t unit) noexcept nogil:
        return <ZSpage*>self.zspages.base + unit

    cdef uint64_t offset_of(self, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil:
        """Where an object of `length` bytes in this slot begins: the class follows from the length."""
        return <uint64_t>unit * UNIT_SIZE + slot * self.classes[self.class_of[length]].size

    cdef bint saves(self, uint32_t length, uint32_t shorter) noexcept nogil:
        """Whether `shorter` bytes lie in a smaller slot than `length` bytes do."""
        return self.classes[self.class_of[shorter]].size < self.classes[self.class_of[length]].size

    # -- allocation ----------------------------------------------------------------------------------------------

    cdef bint alloc(self, uint32_t length, uint32_t* unit, uint32_t* slot) noexcept nogil:
        """A slot for `length` bytes. False at the memory limit or when the arena ends; nothing changed then."""
        cdef int index = self.class_of[length]
        cdef SizeClass* klass = &self.classes[index]
        cdef ZSpage* page
        cdef int group
        if klass.groups:
            group = 31 - __builtin_clz(klass.groups)
            unit[0] = klass.head[group]
        elif not self._new_zspage(index, unit):
            return False
        self._changes(unit[0])
        page = self.zspage(unit[0])
        if page.free_slot != NO_SLOT:
            slot[0] = page.free_slot
            page.free_slot = (<uint16_t*>(self.arena.base + self.offset_of(unit[0], slot[0], length)))[0]
        else:
            if not self._grow_top(unit[0], page):
                if page.used == 0:
                    self._unlist(unit[0], page)
                    page.state_group = NOT_A_ZSPAGE
                    klass.zspages -= 1
                    self.zspage_count -= 1
                    self.arena.give(unit[0])
                return False
            slot[0] = page.top - 1
        page.used += 1
        klass.used += 1
        self._regroup(unit[0], page)
        return True

    cdef void _changes(self, uint32_t unit) noexcept nogil:
        """Tell a check that slots or pages of a zspage are about to be taken or given back."""
        if self.census is not None:
            self.census.change(unit)

    cdef bint _new_zspage(self, int index, uint32_t* unit) noexcept nogil:
        cdef uint32_t taken = self.arena.take()
        cdef ZSpage* page
        if taken == 0:
            return False
        if not region_ensure(&self.zspages, (<uint64_t>taken + 1) * sizeof(ZSpage)):
            self.arena.give(taken)
            return False
        self._changes(taken)
        page = self.zspage(taken)
        page.used = 0
        page.top = 0
        page.free_slot = NO_SLOT
        page.size_class = index
        page.state_group = LISTED
        self.classes[index].zspages += 1
        self.zspage_count += 1
        self._list(taken, page)
        unit[0] = taken
        return True

    cdef bint _grow_top(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """Use one slot more, and the pages that it reaches into."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint64_t before = self.pages_of(klass, page.top)
        cdef uint64_t after = self.pages_of(klass, page.top + 1)
        if after > before:
            if self.pages_limit and self.pages_used + (after - before) > self.pages_limit:
                return False
            if not self.arena.commit(<uint64_t>unit * UNIT_SIZE + before * PAGE_SIZE, (after - before) * PAGE_SIZE):
                return False
            self.pages_used += after - before
            klass.pages_used += after - before
            if self.pages_used > self.pages_max:
                self.pages_max = self.pages_used
        page.top += 1
        return True

    cdef void free(self, uint32_t unit, uint32_t slot) noexcept nogil:
        """Take a slot back; the pages of a zspage that empties return to the system."""
        cdef ZSpage* page = self.zspage(unit)
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint64_t pages
        self._changes(unit)
        page.used -= 1
        klass.used -= 1
        if page.used:
            (<uint16_t*>(self.arena.base + <uint64_t>unit * UNIT_SIZE + slot * klass.size))[0] = page.free_slot
            page.free_slot = slot
            self._regroup(unit, page)
            return
        if page.state_group != FULL:
            self._unlist(unit, page)
        pages = self.pages_of(klass, page.top)
        page.state_group = NOT_A_ZSPAGE
        klass.zspages -= 1
        self.zspage_count -= 1
        self.pages_used -= pages
        klass.pages_used -= pages
        self.arena.release(<uint64_t>unit * UNIT_SIZE, pages * PAGE_SIZE)
        self.arena.give(unit)

    # -- fullness groups -----------------------------------------------------------------------------------------

    cdef void _list(self, uint32_t unit, ZSpage* page) noexcept nogil:
        cdef int group = page.used * GROUPS // self.classes[page.size_class].slots
        self._list_in(unit, page, LISTED, group)
        self.classes[page.size_class].groups |= 1 << group

    cdef void _list_in(self, uint32_t unit, ZSpage* page, int state, int group) noexcept nogil:
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint32_t head = klass.head[group]
        page.state_group = state | (group << 4)
        page.prev = 0
        page.next = head
        if head:
            self.zspage(head).prev = unit
        klass.head[group] = unit
        klass.evacuating += state == EVACUATING

    cdef void _unlist(self, uint32_t unit, ZSpage* page) noexcept nogil:
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef int group = page.state_group >> 4
        klass.evacuating -= page.state_group & 15 == EVACUATING
        if page.next:
            self.zspage(page.next).prev = page.prev
        if page.prev:
            self.zspage(page.prev).next = page.next
        else:
            klass.head[group] = page.next
            if page.next == 0:
                klass.groups &= ~(1 << group)

    cdef void _regroup(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """Put a zspage where its number of used slots belongs, after that number changed."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef int state = page.state_group & 15
        if state == EVACUATING:
            return
        if page.used == klass.slots:
            if state == LISTED:
                self._unlist(unit, page)
            page.state_group = FULL
        elif state == FULL:
            self._list(unit, page)
        elif page.used * GROUPS // klass.slots != page.state_group >> 4:
            self._unlist(unit, page)
            self._list(unit, page)

    # -- compaction ----------------------------------------------------------------------------------------------

    # A class at a time, a zspage a call: the caller lets the lock go between them. Each call looks at the counts of its
    # moment, so a plan stays right while clients store and free between two of them.

    cdef uint64_t evacuation_gain(self, int index) noexcept nogil:
        """How many pages evacuating a class would return."""
        cdef SizeClass* klass = &self.classes[index]
        cdef uint32_t keep
        if self._next_to_evacuate(index) == 0:
            return 0
        keep = <uint32_t>(klass.used // klass.slots)
        return klass.pages_used - min(klass.pages_used, <uint64_t>keep * klass.pages + self._rest_pages(klass))

    cdef bint plan_evacuation(self, int index) noexcept nogil:
        """Mark the next zspage of a class whose objects fit elsewhere. False when there is none left.

        Nothing is allocated from a marked zspage until end_evacuation.
        """
        cdef uint32_t unit = self._next_to_evacuate(index)
        if unit == 0:
            return False
        self._unlist(unit, self.zspage(unit))
        self._list_in(unit, self.zspage(unit), EVACUATING, EVACUATION_GROUP)
        return True

    cdef uint32_t _next_to_evacuate(self, int index) noexcept nogil:
        """One of the emptiest zspages of a class, 0 when all are to be kept.

        The fullest are kept, as many as the objects fill, and one that holds the rest. The rest goes into a fresh
        zspage instead when the kept one reaches over more pages than the rest needs.
        """
        cdef SizeClass* klass = &self.classes[index]
        cdef uint32_t keep = <uint32_t>(klass.used // klass.slots)
        cdef uint32_t left = klass.zspages - klass.evacuating
        cdef uint32_t unit
        if left <= keep or klass.groups == 0:
            return 0
        unit = klass.head[__builtin_ctz(klass.groups)]
        if left == keep + 1 and self.pages_of(klass, self.zspage(unit).top) <= self._rest_pages(klass):
            return 0
        return unit

    cdef uint64_t _rest_pages(self, SizeClass* klass) noexcept nogil:
        """Pages for the objects of a class that do not fill a zspage."""
        return self.pages_of(klass, klass.used % klass.slots)

    cdef uint64_t pages_of(self, SizeClass* klass, uint64_t slots) noexcept nogil:
        """Pages that the first `slots` slots of a zspage reach into."""
        return (slots * klass.size + PAGE_SIZE - 1) // PAGE_SIZE

    cdef bint is_evacuating(self, uint32_t unit) noexcept nogil:
        return self.zspage(unit).state_group & 15 == EVACUATING

    cdef bint end_evacuation(self, int index) noexcept nogil:
        """Use a zspage again that could not be emptied. False when the class has none left."""
        cdef SizeClass* klass = &self.classes[index]
        cdef uint32_t unit = klass.head[EVACUATION_GROUP]
        cdef ZSpage* page = self.zspage(unit)
        if unit == 0:
            return False
        self._unlist(unit, page)
        if page.used == klass.slots:
            page.state_group = FULL
        else:
            self._list(unit, page)
        return True

    cdef uint32_t unit_end(self) noexcept nogil:
        """Behind the last unit that can be a zspage."""
        return <uint32_t>min(<uint64_t>self.arena.unit_high, self.zspages.committed // sizeof(ZSpage))

    # -- opening an arena again ----------------------------------------------------------------------------------

    cdef bint holds(self, uint32_t unit) noexcept nogil:
        """Whether the unit is a zspage."""
        return unit < self.unit_end() and self.zspage(unit).state_group != NOT_A_ZSPAGE

    cdef bint adoption_begin(self) noexcept nogil:
        return region_reserve(&self.adopted, <uint64_t>self.arena.unit_high * (MAX_SLOTS // 8))

    cdef bint adopt(self, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil:
        """Count a slot that a handle cell names. False when it cannot be one: a broken arena, or no memory."""
        cdef int index = self.class_of[length]
        cdef SizeClass* klass = &self.classes[index]
        cdef ZSpage* page
        cdef uint8_t* bits
        if unit == 0 or unit >= self.arena.unit_high or slot >= klass.slots:
            return False
        if not region_ensure(&self.zspages, (<uint64_t>unit + 1) * sizeof(ZSpage)):
            return False
        if not region_ensure(&self.adopted, (<uint64_t>unit + 1) * (MAX_SLOTS // 8)):
            return False
        page = self.zspage(unit)
        if page.state_group == NOT_A_ZSPAGE:
            page.state_group = FULL  # until adoption_done knows better
            page.size_class = index
            page.free_slot = NO_SLOT
            klass.zspages += 1
            self.zspage_count += 1
        bits = self.adopted.base + <uint64_t>unit * (MAX_SLOTS // 8) + slot // 8
        if page.size_class != index or bits[0] >> (slot & 7) & 1:
            return False
        bits[0] |= 1 << (slot & 7)
        page.used += 1
        klass.used += 1
        if slot >= page.top:
            page.top = slot + 1
        return True

    cdef void adoption_done(self) noexcept nogil:
        """Count pages, thread the free slots, list the zspages with room, return the pages behind the last object."""
        cdef uint32_t unit
        cdef int slot
        cdef uint64_t pages
        cdef ZSpage* page
        cdef SizeClass* klass
        cdef uint8_t* bits
        for unit in range(self.unit_end()):
            page = self.zspage(unit)
            if page.state_group == NOT_A_ZSPAGE:
                continue
            klass = &self.classes[page.size_class]
            pages = self.pages_of(klass, page.top)
            self.pages_used += pages
            klass.pages_used += pages
            self.arena.release(<uint64_t>unit * UNIT_SIZE + pages * PAGE_SIZE, UNIT_SIZE - pages * PAGE_SIZE)
            bits = self.adopted.base + <uint64_t>unit * (MAX_SLOTS // 8)
            for slot from page.top > slot >= 0:
                if not bits[slot // 8] >> (slot & 7) & 1:
                    (<uint16_t*>(self.arena.base + <uint64_t>unit * UNIT_SIZE + slot * klass.size))[0] = page.free_slot
                    page.free_slot = slot
            if page.used < klass.slots:
                self._list(unit, page)
        region_free(&self.adopted)
        self.pages_max = self.pages_used


cdef extern from * nogil:
    int __builtin_clz(unsigned int)
    int __builtin_ctz(unsigned int)
