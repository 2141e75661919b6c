# A pool's ledger: how many pages it takes, and how many it may.
#
# Counted is whatever is resident for the pool's sake: zspages, nodes of block tables, cells, and the derived state
# beside them (arena.pyx, Region). Who takes a page enters it first and is refused at the limit; who gives one back
# enters that. What cannot be refused without losing something is entered all the same (ledger_count): it is small, and
# bounded by what was taken before.
#
# Of the limit KEPT_PAGES are kept for what makes room: objects that compaction moves, nodes that a trim copies. Without
# them neither could do anything exactly when it is needed.
#
# Not locked here: every call is covered by the pool's lock, or on its shared side by the depot's (kit.pyx). Beside
# others ledger_is_near is a hint.

from libc.stdint cimport int64_t, uint64_t

from nbdzram.engine.publish cimport amend64, look64
from nbdzram.engine.purse cimport Sum, purse_add, purse_is_near, purse_take

cdef enum:
    KEPT_PAGES = 16   # what the rest of a size class may need before the zspage is gone that it comes from
    KEPT_SHARE = 16   # a limit so small that this is more than a sixteenth of it keeps a sixteenth
    NEAR_PAGES = 256  # a limit is near: more than sixteen threads may take for a run of blocks each

cdef struct Ledger:
    uint64_t used
    uint64_t limit     # 0: none
    Sum* purse         # of all pools that share what is left of the machine; NULL: of none
    bint making_room   # whoever holds the lock does: what is kept is for it
    uint64_t declined  # times that the purse had none, ever

cdef inline uint64_t ledger_room(const Ledger* ledger) noexcept nogil:
    """Pages that may be taken now."""
    cdef uint64_t kept = 0 if ledger.making_room else min(<uint64_t>KEPT_PAGES, ledger.limit // KEPT_SHARE)
    if ledger.limit == 0:
        return <uint64_t>-1 - ledger.used
    return ledger.limit - kept - ledger.used if ledger.used < ledger.limit - kept else 0

cdef inline bint ledger_take(Ledger* ledger, uint64_t pages) noexcept nogil:
    """Enter pages that are about to be taken. False at the limit; nothing changed then."""
    if pages > ledger_room(ledger):
        return False
    if ledger.purse != NULL and not purse_take(ledger.purse, pages, ledger.making_room):
        amend64(&ledger.declined, ledger.declined + 1)
        return False
    amend64(&ledger.used, ledger.used + pages)
    return True

cdef inline void ledger_count(Ledger* ledger, uint64_t pages) noexcept nogil:
    """Enter pages that are taken whatever the limit."""
    if ledger.purse != NULL:
        purse_add(&ledger.purse.used, <int64_t>pages)
    amend64(&ledger.used, ledger.used + pages)

cdef inline void ledger_give(Ledger* ledger, uint64_t pages) noexcept nogil:
    """Enter pages that are given back."""
    if ledger.purse != NULL:
        purse_add(&ledger.purse.used, -<int64_t>pages)
    amend64(&ledger.used, ledger.used - pages)

cdef inline bint ledger_is_near(const Ledger* ledger) noexcept nogil:
    """Whether so little may be taken that each page is to be given out by whoever has the pool's lock alone."""
    if ledger.purse != NULL and purse_is_near(ledger.purse, NEAR_PAGES):
        return True
    return ledger.limit != 0 and look64(&ledger.used) + NEAR_PAGES > ledger.limit

cdef inline void ledger_share(Ledger* ledger, Sum* purse) noexcept nogil:
    """Take from that purse from now on, what is taken already included; NULL: from none."""
    if ledger.purse != NULL:
        purse_add(&ledger.purse.used, -<int64_t>ledger.used)
    ledger.purse = purse
    if purse != NULL:
        purse_add(&purse.used, <int64_t>ledger.used)
