from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.directory cimport Directory
from nbdzram.engine.format cimport EXPORTS_MAX, Superblock
from nbdzram.engine.lock cimport Lock
from nbdzram.engine.purse cimport Purse
from nbdzram.engine.sides cimport Seat, Sides
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables
from nbdzram.engine.users cimport Users

cdef struct Counters:
    uint64_t bytes_of[8]
    uint64_t blocks_stored, blocks_same
    uint64_t pages_used, pages_limit, pages_max, pages_in_all, zspages, pages_compacted, pages_folded
    uint64_t huge_now, huge_ever, objects, handles, shared_objects, shared_bytes, pending
    uint64_t folded, inline_folded, moved, recompressed, untried, failed_writes, rotten

cdef struct Compaction:
    # The pass under way, whoever carries it on: compact.pyx.
    int phase
    uint64_t number     # of the pass, counted from 1
    int size_class      # that is being planned, or ended
    uint32_t position   # handles below were visited
    uint32_t end
    uint64_t marked     # zspages to empty
    int64_t returned_before  # this pass: pages (Slab.returned)
    uint64_t moved_ever
    uint64_t retry_at   # after a pass that came to nothing: of Slab.freed_ever

cdef class PoolCore:
    # What readers without a lock look at stands on lines of its own: others would be taken from them by every write.
    cdef Arena arena
    cdef ObjectStore store
    cdef Tables tables
    cdef Directory directory
    cdef uint64_t seed
    cdef uint32_t now            # in units of age (table.pxd)
    cdef bint verify_on          # what is read is held against its fingerprint
    cdef bint pausing            # readers step aside (test_locks)
    cdef uint32_t closing        # readers are turned away
    cdef char apart[128]
    cdef Sides sides             # of `lock`: writers take it beside each other (beside.pyx)
    cdef Lock lock
    cdef Lock maintenance       # held through one step of a fold, compaction or recompression
    cdef bint lock_made
    cdef Users users
    cdef Superblock* superblock
    cdef uint64_t fingerprint_mask
    cdef bint inline_on
    cdef public bint tells_sharing
    cdef readonly Purse purse   # keeps what the ledger refers to; None: this pool shares none
    cdef uint64_t blocks_stored
    cdef uint64_t blocks_same
    cdef uint64_t sum              # number of the sum over all exports that is under way, or was the last (check.pyx)
    cdef uint64_t sum_stored, sum_same
    cdef uint64_t failed_count   # writes that found no room; counted and read without a lock
    cdef uint64_t rotten         # blocks found not to be what was written
    cdef uint32_t rotten_export  # number of the last one's export
    cdef uint64_t rotten_block
    cdef uint64_t looked_again   # blocks that a reader looked at under the lock, as they had changed or were not right
    cdef uint64_t misread        # ... as what it found did not decode to what it should
    cdef Compaction compaction
    cdef uint64_t inline_folded
    cdef uint32_t shift         # 0 or 1: a check turns it, to tell holders in hand from before
    cdef uint64_t in_hand[2]    # by shift: handles that a write holds and no entry does yet
    cdef uint32_t exports_high  # export directory entries below have been used
    cdef uint8_t held[EXPORTS_MAX]  # by number: somebody has the disk of this directory entry in hand
    cdef list _disks

    cdef void read_counters(self, Counters* now) noexcept nogil
    cdef uint64_t pages_in_all(self) noexcept nogil
    cdef bint may_retire(self) noexcept nogil
    cdef bint reclaim(self) noexcept nogil
    cdef void reclaim_ripe(self) noexcept nogil
    cdef void keep_short(self) noexcept nogil
    cdef Seat* begin_look(self) noexcept nogil
    cdef void end_look(self, Seat* seat) noexcept nogil
    cdef void fit_index(self) noexcept nogil
