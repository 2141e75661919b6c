"""Size classes and zspages: where an object's bytes lie.

What it owns: units of the arena, each carved into equal slots of one size class. All of this module's state is
derived: it is rebuilt (adopt) from the handle cells when an arena is opened again.

    zspage = unit of 64 KiB, of which its class uses the first `pages` pages

    | slot 0 | slot 1 | ... | slot top-1 |  never used since it was made  |  tail  |
      used     free           used         not resident, not counted

    zspage of the class whose slots are whole pages: each page comes and goes with its slot, in any order

    |  used  | not resident |  used  | spare | spare |  used  | not resident | ... |

Size classes follow zsmalloc (mm/zsmalloc.c): steps of 16 bytes, the chain of pages that wastes least, and classes that
come out with the same pages and slots are one. The chain may be 16 pages (the kernel's limit is a setting, 8 by
default), as an unused page of a zspage costs nothing here: a page counts from the moment its first slot is used. The
largest class holds what does not compress, a page each; the kernel has it in zspages of one page, which are gone as
soon as their object is. Here a unit has room for 16 of them, so that addresses suffice, and each still goes by itself.

Spare pages are the run of adjacent ones that were freed last, kept until another is freed elsewhere or memory is short:
blocks that are written again use them at once, and a trim returns a run with one call. Without them a write over a
block that does not compress took three times as long (4.4 against 1.5 us, measured). There are at most 15 in a pool.

Invariants
1. pages_used counts every page up to `top` of every zspage, of the largest class its used slots and the spare ones
   (which its `top` counts), and no other page of a zspage is resident.
2. A zspage with a free slot below `top`, unless compaction empties it, stands in the list of its fullness group;
   allocation takes from the fullest group. Only where a class has none, a slot above `top` is used, which may need a
   page: so an allocation that is refused for want of a page could not have done without it.
3. A zspage without objects does not exist: its pages went back to the system when the last object left.
4. A slot that no cell names any more is retired: it stays used, with the bytes that it has, until no reader can see
   them (quiescence.pyx); only then is it freed, so that the next object or the list of free slots is written into it,
   or its page goes back.

Not locked here: every call is covered by the pool's lock, or on its shared side by the depot's (kit.pyx).
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from nbdzram.engine.arena cimport Arena, region_ensure, region_expect, region_free, region_reserve, region_shrink
from nbdzram.engine.ledger cimport ledger_give, ledger_room, ledger_take
from nbdzram.engine.limbo cimport (
    LIMBO_ROOM, limbo_count, limbo_due, limbo_has_room, limbo_one_less, limbo_one_more, limbo_ripen,
)
from nbdzram.engine.must cimport must
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_PAGES, UNIT_SIZE
from nbdzram.engine.publish cimport amend8, claim_bit, exchange8, look8, look32, step_aside

import zlib

from nbdzram.errors import ArenaError


@cython.final
cdef class Slab:
    """Slots of an arena."""

    def __cinit__(self, Arena arena):
        self.arena = arena
        if not region_reserve(&self.zspages, (arena.reserved // UNIT_SIZE) * sizeof(ZSpage), &arena.ledger) or (
                not region_ensure(&self.zspages, sizeof(ZSpage))):
            raise ArenaError("cannot reserve addresses for zspage descriptors; raise ulimit -v")
        self.retired = <uint64_t*>malloc(LIMBO_ROOM * sizeof(uint64_t))
        if self.retired == NULL:
            raise MemoryError
        self._make_classes()

    def __dealloc__(self):
        free(self.retired)
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
                assert size < PAGE_SIZE or slots <= 16  # free_slot has a bit for each
                memset(&self.classes[klass], 0, sizeof(SizeClass))
                self.classes[klass].size = self.slot_size[klass] = size
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
        return <uint64_t>unit * UNIT_SIZE + slot * self.slot_size[self.class_of[length]]

    cdef bint saves(self, uint32_t length, uint32_t shorter) noexcept nogil:
        """Whether `shorter` bytes lie in a smaller slot than `length` bytes do."""
        return self.classes[self.class_of[shorter]].size < self.classes[self.class_of[length]].size

    # -- allocation ----------------------------------------------------------------------------------------------

    cdef bint alloc(self, uint32_t length, uint32_t* unit, uint32_t* slot) noexcept nogil:
        """A slot for `length` bytes. False at the limit or when the arena ends; nothing changed then."""
        cdef int index = self.class_of[length]
        cdef SizeClass* klass = &self.classes[index]
        cdef ZSpage* page
        cdef int looked = 0
        # Before a zspage is chosen: it may be the one that goes.
        while looked < RECLAIMED_AT_ONCE and limbo_count(&self.limbo) and self._needs_page(klass) and self.reclaim(1):
            looked += 1
        if self.spare_count and self.is_whole(klass):
            unit[0] = self.spare_unit
        elif klass.groups:
            unit[0] = klass.head[31 - __builtin_clz(klass.groups)]
        elif klass.head[GROWING_GROUP]:
            unit[0] = klass.head[GROWING_GROUP]
        elif not self._new_zspage(index, unit):
            return False
        page = self.zspage(unit[0])
        self._changes(unit[0])
        if not (self._take_page_slot(unit[0], page, slot) if self.is_whole(klass)
                else self._take_slot(unit[0], page, slot)):
            if page.used == 0:
                self._unlist(unit[0], page)
                self._give_zspage(unit[0], page)
            return False
        page.used += 1
        klass.used += 1
        self._regroup(unit[0], page)
        return True

    cdef bint _needs_page(self, SizeClass* klass) noexcept nogil:
        """Whether the next slot of a class is one that no object has had, in a page of its own."""
        cdef uint64_t top
        if self.is_whole(klass):
            return self.spare_count == 0
        if klass.groups:
            return False
        if klass.head[GROWING_GROUP] == 0:
            return True
        top = self.zspage(klass.head[GROWING_GROUP]).top
        return self.pages_of(klass, top + 1) > self.pages_of(klass, top)

    cdef bint is_whole(self, SizeClass* klass) noexcept nogil:
        """Whether its slots are whole pages."""
        return klass.size == PAGE_SIZE

    cdef bint _take_slot(self, uint32_t unit, ZSpage* page, uint32_t* slot) noexcept nogil:
        """A slot that was free before, or one more, and the page that it reaches into."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint64_t before, after
        if page.free_slot != NO_SLOT:
            slot[0] = page.free_slot
            page.free_slot = self._free_link(unit, slot[0], klass)[0]
            return True
        before = self.pages_of(klass, page.top)
        after = self.pages_of(klass, page.top + 1)
        if after > before and not self._take_pages(
                klass, <uint64_t>unit * UNIT_SIZE + before * PAGE_SIZE, after - before):
            return False
        slot[0] = page.top
        page.top += 1
        klass.reached += 1
        return True

    cdef bint _take_page_slot(self, uint32_t unit, ZSpage* page, uint32_t* slot) noexcept nogil:
        """A spare page, or the first free one of a zspage whose slots are pages."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        if self.spare_count and unit == self.spare_unit:
            self.spare_count -= 1
            slot[0] = self.spare_first + self.spare_count
        else:
            slot[0] = __builtin_ctz(page.free_slot)
            if not self._take_pages(klass, <uint64_t>unit * UNIT_SIZE + slot[0] * PAGE_SIZE, 1):
                return False
            page.top += 1
            klass.reached += 1
        page.free_slot &= ~(1 << slot[0])
        return True

    cdef void _spare(self, uint32_t unit, uint32_t slot) noexcept nogil:
        """A page that was freed joins the spare ones beside it, or takes their place."""
        if self.spare_count and unit == self.spare_unit and slot + 1 == self.spare_first:
            self.spare_first = slot
        elif self.spare_count == 0 or unit != self.spare_unit or slot != self.spare_first + self.spare_count:
            self.return_spares()
            self.spare_unit = unit
            self.spare_first = slot
        self.spare_count += 1

    cdef void return_spares(self) noexcept nogil:
        cdef ZSpage* page = self.zspage(self.spare_unit)
        cdef SizeClass* klass
        if self.spare_count == 0:
            return
        self._changes(self.spare_unit)
        klass = &self.classes[page.size_class]
        page.top -= self.spare_count
        klass.reached -= self.spare_count
        self._return_pages(
            klass, <uint64_t>self.spare_unit * UNIT_SIZE + self.spare_first * PAGE_SIZE,
            self.spare_count, self.spare_count)
        self.spare_count = 0

    cdef uint16_t* _free_link(self, uint32_t unit, uint32_t slot, SizeClass* klass) noexcept nogil:
        """Where a free slot names the next one."""
        return <uint16_t*>(self.arena.base + <uint64_t>unit * UNIT_SIZE + slot * klass.size)

    cdef bint _take_pages(self, SizeClass* klass, uint64_t offset, uint64_t count) noexcept nogil:
        """Make pages of the arena a zspage's. False at the limit, or when the system has none."""
        cdef uint64_t before = self.pages_used
        if not ledger_take(&self.arena.ledger, count):
            self.return_spares()
            self.returned[self.cause] += before - self.pages_used
            if not ledger_take(&self.arena.ledger, count):
                return False
        if not self.arena.commit(offset, count * PAGE_SIZE):
            ledger_give(&self.arena.ledger, count)
            return False
        self.pages_used += count
        klass.pages_used += count
        self.returned[self.cause] -= count
        self.pages_max = max(self.pages_max, self.pages_used)
        return True

    cdef void _return_pages(self, SizeClass* klass, uint64_t offset, uint64_t span, uint64_t count) noexcept nogil:
        """Return `span` pages to the system, of which `count` were a zspage's; the others were not resident."""
        self.pages_used -= count
        klass.pages_used -= count
        ledger_give(&self.arena.ledger, count)
        self.arena.release(offset, span * PAGE_SIZE)

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
        page.free_slot = self._no_slot_used(&self.classes[index])
        amend8(&page.size_class, index)
        self.classes[index].zspages += 1
        self.zspage_count += 1
        self._place(taken, page)
        unit[0] = taken
        return True

    cdef uint16_t _no_slot_used(self, SizeClass* klass) noexcept nogil:
        """A fresh zspage's free_slot: an empty list, or a bit for each of its pages."""
        return (1 << klass.slots) - 1 if self.is_whole(klass) else NO_SLOT

    cdef void retire(self, uint32_t unit, uint32_t slot, int cause) noexcept nogil:
        """No cell names a slot any more; it is free when no reader can see it."""
        must(limbo_has_room(&self.limbo, 1), b"who retires slots looks for room first (reclaim.pyx)")
        self._changes(unit)
        self.freed_ever += 1
        self.retire_later(unit, slot, cause)

    cdef void retire_later(self, uint32_t unit, uint32_t slot, int cause) noexcept nogil:
        """The same of a slot that a kit has retired, and counted, before."""
        self.classes[self.zspage(unit).size_class].retired += 1
        self.retired[self.limbo.last & (LIMBO_ROOM - 1)] = retired_word(unit, slot, cause)
        limbo_one_more(&self.limbo)
        self.reclaim(limbo_due(&self.limbo))

    cdef uint64_t retired_item(self, uint64_t position) noexcept nogil:
        return self.retired[position & (LIMBO_ROOM - 1)]

    cdef uint64_t reclaim(self, uint64_t limit) noexcept nogil:
        """Free up to `limit` retired slots that nobody sees any more; how many. Their pages are counted for who retired
        them."""
        cdef uint64_t count = 0, item
        cdef uint32_t unit
        cdef uint64_t pages
        while count < limit and (self.limbo.first < self.limbo.ripe or limbo_ripen(&self.limbo)):
            item = self.retired_item(self.limbo.first)
            unit = retired_unit(item)
            limbo_one_less(&self.limbo)
            self.classes[self.zspage(unit).size_class].retired -= 1
            pages = self.pages_used
            self._free(unit, retired_slot(item))
            self.returned[retired_for(item)] += pages - self.pages_used
            count += 1
        return count

    cdef uint8_t hand_out(self, int index, uint8_t wanted, uint64_t* slots) noexcept nogil:
        """Slots of a size class for a kit (retired_word), which takes the last first; in use from now on: one, and as
        many as need no page more. 0: none."""
        cdef SizeClass* klass = &self.classes[index]
        cdef uint32_t unit, slot
        cdef uint8_t count = 0, turned
        while count < wanted and (count == 0 or not self._needs_page(klass)) and self.alloc(klass.size, &unit, &slot):
            slots[count] = retired_word(unit, slot, RELEASED)
            count += 1
        for turned in range(count // 2):
            slots[turned], slots[count - 1 - turned] = slots[count - 1 - turned], slots[turned]
        return count

    cdef void take_back(self, uint64_t item) noexcept nogil:
        """Free a slot of a kit that nobody sees any more."""
        cdef uint64_t pages = self.pages_used
        self._free(retired_unit(item), retired_slot(item))
        self.returned[RELEASED] += pages - self.pages_used

    cdef bint is_emptied(self, uint32_t index, uint32_t unit) noexcept nogil:
        """Whether compaction empties a zspage, in which a slot is in use. Beside others: only who is alone marks
        one."""
        return (look32(&self.classes[index].head[EVACUATION_GROUP])
                and look8(&self.zspage(unit).state_group) & 15 == EVACUATING)

    cdef void _free(self, uint32_t unit, uint32_t slot) noexcept nogil:
        """Take a slot back; all pages of a zspage that empties return to the system."""
        cdef ZSpage* page = self.zspage(unit)
        cdef SizeClass* klass = &self.classes[page.size_class]
        self._changes(unit)
        page.used -= 1
        klass.used -= 1
        if page.used == 0:
            self._end_zspage(unit, page)
            return
        if self.is_whole(klass):
            page.free_slot |= 1 << slot
            self._spare(unit, slot)
        else:
            self._free_link(unit, slot, klass)[0] = page.free_slot
            page.free_slot = slot
        self._regroup(unit, page)

    cdef void _end_zspage(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """The last object of a zspage left."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint64_t pages = self.pages_of(klass, page.top)
        if unit == self.spare_unit:
            self.spare_count = 0
        if page.state_group != FULL:
            self._unlist(unit, page)
        self._return_pages(klass, <uint64_t>unit * UNIT_SIZE, UNIT_PAGES, pages)
        self._give_zspage(unit, page)

    cdef void _give_zspage(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """Give the unit back of a zspage that has no object, no page and stands in no list."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        klass.reached -= page.top
        klass.zspages -= 1
        self.zspage_count -= 1
        amend8(&page.state_group, NOT_A_ZSPAGE)
        self.arena.give(unit)

    # -- fullness groups -----------------------------------------------------------------------------------------

    cdef void _place(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """Put a zspage that stands in no list where its slots belong."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef int group = self._group_of(page)
        if page.used == klass.slots:
            amend8(&page.state_group, FULL)
        elif group == GROWING_GROUP:
            self._list_in(unit, page, GROWING, group)
        else:
            self._list_in(unit, page, LISTED, group)
            klass.groups |= 1 << group

    cdef int _group_of(self, ZSpage* page) noexcept nogil:
        """The list of a zspage that is not full, and not being emptied."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        if page.free_slot == NO_SLOT and not self.is_whole(klass):
            return GROWING_GROUP
        return page.used * GROUPS // klass.slots

    cdef void _list_in(self, uint32_t unit, ZSpage* page, int state, int group) noexcept nogil:
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint32_t head = klass.head[group]
        amend8(&page.state_group, state | (group << 4))
        page.prev = 0
        page.next = head
        if head:
            self.zspage(head).prev = unit
        klass.head[group] = unit
        if state == EVACUATING:
            klass.left += page.top

    cdef void _unlist(self, uint32_t unit, ZSpage* page) noexcept nogil:
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef int group = page.state_group >> 4
        if page.state_group & 15 == EVACUATING:
            klass.left -= page.top
        if page.next:
            self.zspage(page.next).prev = page.prev
        if page.prev:
            self.zspage(page.prev).next = page.next
        else:
            klass.head[group] = page.next
            if page.next == 0:
                klass.groups &= ~(1 << group)

    cdef void _regroup(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """Put a zspage where its slots belong, after they changed."""
        cdef SizeClass* klass = &self.classes[page.size_class]
        if page.state_group & 15 == EVACUATING:
            return
        if page.state_group != FULL:
            if page.used != klass.slots and self._group_of(page) == page.state_group >> 4:
                return
            self._unlist(unit, page)
        self._place(unit, page)

    # -- compaction ----------------------------------------------------------------------------------------------

    # A class at a time, a zspage a call: the caller lets the lock go between them. Each call looks at the counts of its
    # moment, so a plan stays right while clients store and free between two of them.

    cdef uint64_t evacuation_gain(self, int index) noexcept nogil:
        """How many pages evacuating a class would return, were there room to move everything."""
        cdef SizeClass* klass = &self.classes[index]
        cdef uint64_t whole = klass.used // klass.slots
        if self._next_to_evacuate(index) == 0:
            return 0
        return klass.pages_used - min(
            klass.pages_used, whole * klass.pages + self.pages_of(klass, klass.used % klass.slots))

    cdef bint can_evacuate(self, int index) noexcept nogil:
        """Whether a class has a zspage whose objects fit elsewhere."""
        return self._next_to_evacuate(index) != 0

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

        It goes when its objects, beside those that are leaving already, fit into slots that were free before, or when
        those that do not reach over fewer pages than it has, and there is room for these.
        """
        cdef SizeClass* klass = &self.classes[index]
        cdef uint32_t unit
        cdef ZSpage* page
        cdef int64_t fit
        cdef uint64_t grown
        if klass.groups == 0 or self.is_whole(klass):
            return 0
        unit = klass.head[__builtin_ctz(klass.groups)]
        page = self.zspage(unit)
        # Free below top elsewhere, less those that are leaving.
        fit = <int64_t>(klass.reached - klass.left - page.top) - <int64_t>(klass.used - page.used)
        grown = self.pages_of(klass, page.used - min(<int64_t>page.used, max(<int64_t>0, fit)))
        if grown >= self.pages_of(klass, page.top):
            return 0
        if grown > ledger_room(&self.arena.ledger):
            return 0
        return unit

    cdef uint64_t pages_of(self, SizeClass* klass, uint64_t slots) noexcept nogil:
        """Pages that the first `slots` slots of a zspage reach into."""
        return (slots * klass.size + PAGE_SIZE - 1) // PAGE_SIZE

    cdef bint is_evacuating(self, uint32_t unit) noexcept nogil:
        return self.zspage(unit).state_group & 15 == EVACUATING

    cdef bint end_evacuation(self, int index) noexcept nogil:
        """Use a zspage again that could not be emptied. False when the class has none left."""
        cdef uint32_t unit = self.classes[index].head[EVACUATION_GROUP]
        if unit == 0:
            return False
        self._unlist(unit, self.zspage(unit))
        self._place(unit, self.zspage(unit))
        return True

    cdef uint32_t unit_end(self) noexcept nogil:
        """Behind the last unit that can be a zspage."""
        return <uint32_t>min(<uint64_t>self.arena.unit_high, self.zspages.committed // sizeof(ZSpage))

    # -- opening an arena again ----------------------------------------------------------------------------------

    cdef bint holds(self, uint32_t unit) noexcept nogil:
        """Whether the unit is a zspage."""
        return unit < self.unit_end() and self.zspage(unit).state_group != NOT_A_ZSPAGE

    # Threads find the slots beside each other: each marks what it finds, and what follows from the marks is counted
    # when all have ended. Until then size_class is one more than the class, and 0 where nobody found a slot yet.

    cdef bint adoption_begin(self) noexcept nogil:
        """Have room to mark the slots of all units. False without memory."""
        cdef uint64_t size = <uint64_t>self.arena.unit_high * (MAX_SLOTS // 8)
        if not (region_ensure(&self.zspages, <uint64_t>self.arena.unit_high * sizeof(ZSpage))
                and region_reserve(&self.adopted, size, NULL) and region_ensure(&self.adopted, size)):
            return False
        region_expect(&self.zspages, <uint64_t>self.arena.unit_high * sizeof(ZSpage))
        region_expect(&self.adopted, size)
        return True

    cdef bint adopt(self, uint32_t unit, uint32_t slot, uint32_t length) noexcept nogil:
        """Mark a slot that a handle cell names. False when it cannot be one: a broken arena."""
        cdef uint8_t found, wanted = self.class_of[length] + 1
        cdef ZSpage* page
        if unit == 0 or unit >= self.arena.unit_high or slot >= self.classes[wanted - 1].slots:
            return False
        page = self.zspage(unit)
        found = look8(&page.size_class)
        step_aside()
        if found != wanted and (found or not exchange8(&page.size_class, 0, wanted)) and (
                look8(&page.size_class) != wanted):
            return False
        return claim_bit(self.adopted.base + <uint64_t>unit * (MAX_SLOTS // 8) + slot // 8, slot & 7)

    cdef void adoption_done(self) noexcept nogil:
        """Count slots and pages, thread the free slots, list the zspages with room, return pages without an object."""
        cdef uint32_t unit, last = 0
        for unit in range(self.arena.unit_high):
            if self.zspage(unit).size_class:
                self._count_slots(unit, self.zspage(unit))
                self._place(unit, self.zspage(unit))
                last = unit
        region_free(&self.adopted)
        region_shrink(&self.zspages, (<uint64_t>last + 1) * sizeof(ZSpage))
        self.pages_max = self.pages_used

    cdef void _count_slots(self, uint32_t unit, ZSpage* page) noexcept nogil:
        """What follows from the slots that were marked."""
        cdef uint64_t* words = <uint64_t*>(self.adopted.base + <uint64_t>unit * (MAX_SLOTS // 8))
        cdef SizeClass* klass = &self.classes[page.size_class - 1]
        cdef uint32_t index
        page.size_class -= 1
        for index in range((klass.slots + 63) // 64):
            if words[index]:
                page.used += __builtin_popcountll(words[index])
                page.top = index * 64 + 64 - __builtin_clzll(words[index])
        page.free_slot = self._no_slot_used(klass)
        if self.is_whole(klass):
            page.free_slot &= ~<uint32_t>words[0]
            page.top = page.used
            self._release_free_pages(unit, page)
        else:
            self._thread_free_slots(unit, page)
        self.zspage_count += 1
        self.pages_used += self.pages_of(klass, page.top)
        klass.zspages += 1
        klass.used += page.used
        klass.reached += page.top
        klass.pages_used += self.pages_of(klass, page.top)

    cdef void _release_free_pages(self, uint32_t unit, ZSpage* page) noexcept nogil:
        cdef int slot
        for slot in range(UNIT_PAGES):
            if page.free_slot >> slot & 1:
                self.arena.release(<uint64_t>unit * UNIT_SIZE + slot * PAGE_SIZE, PAGE_SIZE)

    cdef void _thread_free_slots(self, uint32_t unit, ZSpage* page) noexcept nogil:
        cdef SizeClass* klass = &self.classes[page.size_class]
        cdef uint64_t pages = self.pages_of(klass, page.top)
        cdef uint8_t* bits = self.adopted.base + <uint64_t>unit * (MAX_SLOTS // 8)
        cdef int slot
        if page.top < klass.slots:  # else what lies behind is of no slot, and goes with the zspage
            self.arena.release(<uint64_t>unit * UNIT_SIZE + pages * PAGE_SIZE, UNIT_SIZE - pages * PAGE_SIZE)
        if page.used == page.top:
            return
        for slot from page.top > slot >= 0:
            if not bits[slot // 8] >> (slot & 7) & 1:
                self._free_link(unit, slot, klass)[0] = page.free_slot
                page.free_slot = slot


cdef extern from * nogil:
    int __builtin_clz(unsigned int)
    int __builtin_clzll(unsigned long long)
    int __builtin_popcountll(unsigned long long)
    int __builtin_ctz(unsigned int)
