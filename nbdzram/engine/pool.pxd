from libc.stdint cimport uint8_t, uint32_t, uint64_t

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.store cimport ObjectStore
from nbdzram.engine.table cimport Tables

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <sched.h>

    /* A mutex with two kinds of takers. Folding and compaction take it a million times in a row, and a plain mutex
       would let them: whoever unlocks and locks again wins against a waiter that must first wake up. So they step back
       while a client waits. */
    typedef struct { pthread_mutex_t mutex; int waiting; } PoolLock;

    static void lock_init(PoolLock* lock) {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);  /* held for a microsecond: spin first */
        pthread_mutex_init(&lock->mutex, &attributes);
        pthread_mutexattr_destroy(&attributes);
        lock->waiting = 0;
    }
    static inline void lock_take(PoolLock* lock) {
        if (pthread_mutex_trylock(&lock->mutex) == 0) return;
        __atomic_add_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
        pthread_mutex_lock(&lock->mutex);
        __atomic_sub_fetch(&lock->waiting, 1, __ATOMIC_RELAXED);
    }
    static inline void lock_take_behind(PoolLock* lock) {
        while (__atomic_load_n(&lock->waiting, __ATOMIC_RELAXED)) sched_yield();
        pthread_mutex_lock(&lock->mutex);
    }
    static inline void lock_leave(PoolLock* lock) {
        pthread_mutex_unlock(&lock->mutex);
    }
    """
    ctypedef struct PoolLock:
        pthread_mutex_t mutex
    void lock_init(PoolLock*)
    void lock_take(PoolLock*)
    void lock_take_behind(PoolLock*)
    void lock_leave(PoolLock*)

cdef enum:
    # What an export directory entry is; stored, so never renumbered.
    ENTRY_FREE = 0
    ENTRY_LIVE = 1
    ENTRY_DELETING = 2

    NAME_MAX = 255
    EXPORTS_MAX = 4096

    READ_ONLY_FLAG = 1

cdef struct ExportEntry:
    uint32_t state
    uint32_t flags
    uint64_t size
    uint32_t root
    uint32_t name_length
    char name[488]

cdef struct Superblock:
    char magic[8]
    uint32_t version
    uint32_t page_size
    uint64_t seed
    uint64_t layout
    uint32_t dict_unit[4]
    uint32_t dict_length[4]
    uint32_t tried_strength  # of the strongest recompression

cdef struct Counters:
    uint64_t bytes_of[8]
    uint64_t blocks_stored, blocks_same
    uint64_t pages_used, pages_limit, pages_max, zspages, pages_compacted, pages_folded
    uint64_t huge_now, huge_ever, objects, handles, shared_objects, shared_bytes, pending
    uint64_t folded, inline_folded, moved, recompressed, untried, failed_writes, metadata

cdef class Pool:
    cdef Arena arena
    cdef ObjectStore store
    cdef Tables tables
    cdef PoolLock lock
    cdef pthread_mutex_t maintenance  # held through one step of a fold, compaction or recompression
    cdef bint lock_made
    cdef Superblock* superblock
    cdef uint64_t seed
    cdef uint64_t fingerprint_mask
    cdef bint inline_on
    cdef uint32_t now
    cdef uint64_t blocks_stored
    cdef uint64_t blocks_same
    cdef uint64_t failed_writes
    cdef uint64_t inline_folded
    cdef uint32_t shift         # 0 or 1: a check turns it, to tell holders in hand from before
    cdef uint64_t in_hand[2]    # by shift: handles that a write holds and no entry does yet
    cdef uint32_t exports_high  # export directory entries below have been used
    cdef list _disks

    cdef void read_counters(self, Counters* now, uint64_t exports) noexcept nogil
    cdef ExportEntry* export_entry(self, uint32_t number) noexcept nogil
    cdef void drop_tree(self, uint32_t* place, int level) noexcept nogil
    cdef str _open_again(self)
    cdef bint _open_dictionaries(self) except -1
