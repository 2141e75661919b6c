from libc.stdint cimport uint8_t, uint64_t

from nbdzram.sessions.turns cimport pthread_mutex_t

cdef enum:
    STRAIN_MARGIN = 1 << 20  # a budget with less room than this is used up: a few steps of ordinary size

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int budget_take(uint64_t* used, uint64_t size, uint64_t most) {
        uint64_t before = __atomic_load_n(used, __ATOMIC_RELAXED);
        do if (before + size > most || before + size < before) return 0;
        while (!__atomic_compare_exchange_n(used, &before, before + size, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return 1;
    }
    static inline void budget_add(uint64_t* used, uint64_t size) { __atomic_fetch_add(used, size, __ATOMIC_RELAXED); }
    static inline void budget_sub(uint64_t* used, uint64_t size) { __atomic_fetch_sub(used, size, __ATOMIC_RELAXED); }
    static inline uint64_t budget_used(uint64_t* used) { return __atomic_load_n(used, __ATOMIC_RELAXED); }
    """
    bint budget_take(uint64_t* used, uint64_t size, uint64_t most)
    void budget_add(uint64_t* used, uint64_t size)
    void budget_sub(uint64_t* used, uint64_t size)
    uint64_t budget_used(uint64_t* used)

cdef struct Piece:
    # A buffer. What of it still means something: bytes[start:end].
    Piece* next
    uint8_t* bytes
    size_t room              # bytes that it has place for: `size`, or a little more
    size_t size
    size_t start
    size_t end
    uint64_t charged         # to the budget, until it is freed

cdef class Budget:
    cdef readonly uint64_t limit
    cdef uint64_t _used
    cdef pthread_mutex_t mutex   # of what follows
    cdef Piece* kept             # large buffers that nobody has, the one that came last first
    cdef uint64_t kept_bytes
    cdef bint rested             # none of them was taken since the last call of rest()

    cdef Piece* _take_kept(self, size_t size) noexcept nogil
    cdef bint _keep(self, Piece* piece) noexcept nogil
    cdef Piece* _beyond(self, uint64_t most) noexcept nogil
    cdef void _let_go(self, uint64_t most) noexcept nogil

    cdef inline bint take(self, uint64_t size) noexcept nogil:
        # Charge `size` if there is room for it.
        return budget_take(&self._used, size, self.limit)

    cdef inline bint take_payload(self, uint64_t size) noexcept nogil:
        # The same for at most half of what is left, so that a few huge payloads leave room for many small ones.
        return size <= self.limit and budget_take(&self._used, size, self.limit - size)

    cdef inline bint take_half(self, uint64_t size) noexcept nogil:
        # The same from the first half only: for comfort, which must not use up what replies need.
        return budget_take(&self._used, size, self.limit // 2)

    cdef inline bint strained(self) noexcept nogil:
        # Hardly any room is left: work in small steps.
        return budget_used(&self._used) + STRAIN_MARGIN > self.limit

    cdef inline void force(self, uint64_t size) noexcept nogil:
        # Charge `size` in any case: bytes that are held already.
        budget_add(&self._used, size)

    cdef inline void give_back(self, uint64_t size) noexcept nogil:
        budget_sub(&self._used, size)

cdef Piece* new_piece(size_t size, uint64_t charged, Budget budget) noexcept nogil
cdef void free_piece(Piece* piece, Budget budget) noexcept nogil
