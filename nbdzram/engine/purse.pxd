# What several pools together take, and may take: pages of all their ledgers in one sum.
#
# A ledger has its pool's own limit. A purse has what is left of the machine, which no pool knows alone: parts of it,
# given to each, would refuse one pool what another does not need. So pages are entered here as well, one atomic
# addition where pages are taken, and refused beyond the ceiling however many pools ask at once.

from libc.stdint cimport int64_t

cdef extern from * nogil:
    """
    static inline int64_t nbdzram_purse_add(int64_t* sum, int64_t by) {
        return __atomic_add_fetch(sum, by, __ATOMIC_RELAXED);
    }
    static inline int64_t nbdzram_purse_look(const int64_t* word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
    static inline void nbdzram_purse_set(int64_t* word, int64_t to) { __atomic_store_n(word, to, __ATOMIC_RELAXED); }
    """
    int64_t purse_add "nbdzram_purse_add" (int64_t* sum, int64_t by)
    int64_t purse_look "nbdzram_purse_look" (const int64_t* word)
    void purse_set "nbdzram_purse_set" (int64_t* word, int64_t to)

cdef enum:
    PURSE_KEPT = 64  # pages beyond the ceiling for what makes room: a few pools compact at once, KEPT_PAGES each

cdef struct Sum:
    int64_t used
    int64_t ceiling  # 0: none

cdef inline bint purse_take(Sum* sum, int64_t pages, bint making_room) noexcept nogil:
    """False beyond the ceiling; nothing changed then."""
    cdef int64_t ceiling = purse_look(&sum.ceiling)
    if ceiling and purse_add(&sum.used, pages) > ceiling + (PURSE_KEPT if making_room else 0):
        purse_add(&sum.used, -pages)
        return False
    if ceiling == 0:
        purse_add(&sum.used, pages)
    return True

cdef inline bint purse_is_near(const Sum* sum, int64_t pages) noexcept nogil:
    """Whether the ceiling is nearer than so many pages."""
    cdef int64_t ceiling = purse_look(&sum.ceiling)
    return ceiling != 0 and purse_look(&sum.used) + pages > ceiling

cdef class Purse:
    cdef Sum sum
