"""Counting things while they change.

A census adds up what each of many numbered things (cells, zspages, nodes) weighs: their sums must be what the engine
keeps as counters. Things change between two holds of the pool's lock, so whoever is about to change one says so first:

    number >= counted   not counted yet: a change needs no notice
    settled             counted as it is now
    open                counted once; it was about to change, so its weight left the sums; it waits to be counted again

              count_on               change
    uncounted ──────────> settled ────────────> open
                             ^                    │
                             └────────────────────┘
                                    count_on

Invariants
1. The sums are those of the settled things, always: a thing that changes is never among them.
2. So when all are settled, the sums are exact at that moment, and can be held against the counters in the same hold.
3. A thing that is settled has not changed since it was counted last: what was learnt about it since then is still true.

Counting again is quicker than writing a block by far, so that the open ones run out however busy clients are. Without a
census, a change costs one comparison with None; with one, what weighing costs. Memory: a bit a number, and 4 bytes for
each that changes, made sure of (reserve) before it is counted, so that `change` cannot fail.

Not locked here: the pool's lock covers every call.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport region_ensure, region_free, region_reserve

from nbdzram.errors import EngineError


cdef class Census:
    """The states of numbered things. A subclass says what one weighs, and what is to hold of it."""

    def __cinit__(self, *_):
        if (not region_reserve(&self.bits, <uint64_t>1 << 29, NULL)
                or not region_reserve(&self.numbers, <uint64_t>4 << 32, NULL)):
            raise EngineError("cannot reserve addresses for a check; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.bits)
        region_free(&self.numbers)

    cdef void weigh(self, uint32_t number, int sign) noexcept nogil:
        """Add (sign 1) or take away (-1) what a thing weighs as it is now."""

    cdef uint32_t look(self, uint32_t number, char* complaint) noexcept nogil:
        """Complain if a thing is not right in itself (COMPLAINT bytes). What looking cost, at least 1."""
        return 1

    cdef bint reserve(self, uint64_t count) noexcept nogil:
        """Make sure that numbers below `count` can be counted. False without memory."""
        return region_ensure(&self.bits, count // 8 + 1) and region_ensure(&self.numbers, count * sizeof(uint32_t))

    cdef void change(self, uint32_t number) noexcept nogil:
        """A thing is about to change; it may be told several times."""
        cdef uint8_t* place = self.bits.base + (number >> 3)
        if not self.is_settled(number):
            return
        self.weigh(number, -1)
        place[0] |= 1 << (number & 7)
        (<uint32_t*>self.numbers.base)[self.opened] = number
        self.opened += 1

    cdef bint is_settled(self, uint64_t number) noexcept nogil:
        return number < self.counted and not self.bits.base[number >> 3] >> (number & 7) & 1

    cdef uint32_t count_on(self, uint64_t end, uint32_t limit, char* complaint) noexcept nogil:
        """Settle things below `end`, and look at each, until that cost `limit`; what it cost, less when all are
        settled."""
        cdef uint32_t number
        cdef uint32_t cost = 0
        while cost < limit and (self.counted < end or self.opened):
            if self.counted < end:
                number = <uint32_t>self.counted
                self.counted += 1
            else:
                self.opened -= 1
                number = (<uint32_t*>self.numbers.base)[self.opened]
                self.bits.base[number >> 3] &= ~(1 << (number & 7))
            self.weigh(number, 1)
            cost += self.look(number, complaint)
        return cost
