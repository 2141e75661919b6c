"""Who may be reading without a lock, and when nobody is who may still see what was freed.

A thread that reads pools without their locks is *online* meanwhile; between, it is quiescent: it holds no pointer into
any pool, and no handle, slot or page that it found in one. What is freed is first made unreachable, and used again
after a *grace period*: once every thread that was online then has been quiescent.

    epoch      a number that grows with every grace period that begins
    watch      a thread's word: OFFLINE, or an epoch that was when the thread last was quiescent

    reader   online:  watch = epoch; fence; ... reads ...          offline:  watch = OFFLINE
    writer   unlink;  fence; stamp = epoch, epoch + 1            over:     fence; each watch OFFLINE, or above the stamp

Why a reader whose watch is above the stamp cannot see what was unlinked before it: the watch is an epoch that began
behind the stamp, so behind the fence that the unlinking stands before; the reader's fence comes after it, and its loads
after that. Why one whose watch was OFFLINE cannot: its fence comes after the look that found it so, and the unlinking
stands before the fence of that look. A watch may be older than the thread's last quiet moment: that only makes others
wait.

Invariants
1. A thread that is online takes no interpreter lock, and no lock whose holder may wait for a grace period (of a pool's:
   the maintenance lock). The pool's lock and a leaf's stripe are held by nobody who waits, so it may take these.
2. Who waits for a grace period is offline meanwhile, and has no pointer into a pool, in none of its callers either.
3. A watch is written by its thread alone. It stays where it is for ever, and is another's when its thread has ended.

Calls nest: an I/O thread may be online for a whole turn and call a disk meanwhile. Each call of a disk that begins says
`quiescent`, for a thread between two calls holds nothing.

There is no limit to the threads but memory. One for whose watch there is none is not online, and reads under the locks.
"""

from libc.stdint cimport uint64_t

from nbdzram.engine.wait cimport wait_on

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <time.h>

    #define NBDZRAM_OFFLINE 0u

    typedef struct Watch {
        uint64_t seen;
        uint64_t calls;     /* into the engine; for whoever wants to know whether clients come */
        uint32_t depth;     /* of calls within calls */
        uint32_t taken;     /* by a thread that lives */
        uint32_t number;    /* from 0; no two that live have the same */
        struct Watch* next; /* the older ones; the list only grows */
    } __attribute__((aligned(128))) Watch;  /* two lines: processors fetch them in pairs */

    static uint64_t nbdzram_epoch __attribute__((aligned(128))) = 1;
    static Watch* nbdzram_watches __attribute__((aligned(128))) = NULL;
    static uint32_t nbdzram_watches_ever = 0;
    static __thread Watch* nbdzram_watch = NULL;
    static pthread_key_t nbdzram_watch_key;
    static int nbdzram_waiting = 0;     /* threads, for a grace period; tests wait for them */
    static int nbdzram_refuses = 0;     /* to have one more watched; for tests */

    static void nbdzram_watch_left(void* watch) {  /* its thread ended */
        nbdzram_watch = NULL;
        __atomic_store_n(&((Watch*)watch)->seen, NBDZRAM_OFFLINE, __ATOMIC_RELEASE);
        __atomic_store_n(&((Watch*)watch)->taken, 0, __ATOMIC_RELEASE);
    }
    static void nbdzram_watches_forked(void) {  /* the child has none of the other threads */
        Watch* watch;
        for (watch = nbdzram_watches; watch; watch = watch->next) {
            if (watch == nbdzram_watch) continue;
            watch->seen = NBDZRAM_OFFLINE;
            watch->taken = 0;
        }
    }
    static int nbdzram_watches_begin(void) {
        return pthread_key_create(&nbdzram_watch_key, nbdzram_watch_left)
            || pthread_atfork(NULL, NULL, nbdzram_watches_forked);
    }

    static __attribute__((noinline, cold)) Watch* nbdzram_watch_take(void) {
        Watch* watch;
        Watch* each;
        uint32_t nobody;
        void* place;
        if (nbdzram_refuses) return NULL;
        do {  /* the oldest that is nobody's, as it has the lowest number */
            watch = NULL;
            for (each = __atomic_load_n(&nbdzram_watches, __ATOMIC_ACQUIRE); each; each = each->next)
                if (!__atomic_load_n(&each->taken, __ATOMIC_RELAXED)) watch = each;
            nobody = 0;
        } while (watch && !__atomic_compare_exchange_n(
            &watch->taken, &nobody, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
        if (!watch) {
            if (posix_memalign(&place, sizeof(Watch), sizeof(Watch))) return NULL;
            watch = (Watch*)place;
            watch->seen = NBDZRAM_OFFLINE;
            watch->calls = 0;
            watch->taken = 1;
            watch->number = __atomic_fetch_add(&nbdzram_watches_ever, 1, __ATOMIC_RELAXED);
            watch->next = __atomic_load_n(&nbdzram_watches, __ATOMIC_RELAXED);
            while (!__atomic_compare_exchange_n(
                &nbdzram_watches, &watch->next, watch, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
        }
        watch->depth = 0;
        if (pthread_setspecific(nbdzram_watch_key, watch)) {  /* nobody would hear of the thread's end */
            __atomic_store_n(&watch->taken, 0, __ATOMIC_RELEASE);
            return NULL;
        }
        nbdzram_watch = watch;
        return watch;
    }

    static inline void nbdzram_watch_begins(Watch* watch) {
        __atomic_store_n(&watch->seen, __atomic_load_n(&nbdzram_epoch, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    static inline void nbdzram_quiescent(Watch* watch) {
        if (watch->seen != __atomic_load_n(&nbdzram_epoch, __ATOMIC_RELAXED)) nbdzram_watch_begins(watch);
    }
    static int nbdzram_online(void) {
        Watch* watch = nbdzram_watch ? nbdzram_watch : nbdzram_watch_take();
        if (!watch) return 0;
        __atomic_store_n(&watch->calls, watch->calls + 1, __ATOMIC_RELAXED);
        if (watch->depth++ == 0) nbdzram_watch_begins(watch);
        else nbdzram_quiescent(watch);
        return 1;
    }
    static void nbdzram_offline(void) {
        Watch* watch = nbdzram_watch;
        if (!watch || watch->depth == 0) return;  /* its online found no memory */
        if (--watch->depth == 0) __atomic_store_n(&watch->seen, NBDZRAM_OFFLINE, __ATOMIC_RELEASE);
    }
    static void nbdzram_quiescent_now(void) {
        if (nbdzram_watch && nbdzram_watch->depth) nbdzram_quiescent(nbdzram_watch);
    }

    static uint32_t nbdzram_thread_number(void) {
        Watch* watch = nbdzram_watch ? nbdzram_watch : nbdzram_watch_take();
        if (!watch) return UINT32_MAX;
        __atomic_store_n(&watch->calls, watch->calls + 1, __ATOMIC_RELAXED);
        return watch->number;
    }

    static uint64_t nbdzram_grace_begin(void) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return __atomic_fetch_add(&nbdzram_epoch, 1, __ATOMIC_SEQ_CST);
    }
    static int nbdzram_grace_over(uint64_t stamp) {
        Watch* watch;
        uint64_t seen;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        for (watch = __atomic_load_n(&nbdzram_watches, __ATOMIC_ACQUIRE); watch; watch = watch->next) {
            seen = __atomic_load_n(&watch->seen, __ATOMIC_ACQUIRE);
            if (seen != NBDZRAM_OFFLINE && seen <= stamp) return 0;
        }
        return 1;
    }
    static void nbdzram_away(void) {
        Watch* watch = nbdzram_watch;
        if (watch && watch->depth) __atomic_store_n(&watch->seen, NBDZRAM_OFFLINE, __ATOMIC_RELEASE);
    }
    static void nbdzram_back(void) {
        Watch* watch = nbdzram_watch;
        if (watch && watch->depth) nbdzram_watch_begins(watch);
    }
    static void nbdzram_grace_wait(uint64_t stamp) {
        uint32_t looks = 0;
        nbdzram_away();
        __atomic_add_fetch(&nbdzram_waiting, 1, __ATOMIC_RELAXED);
        while (!nbdzram_grace_over(stamp)) wait_on(&looks);
        __atomic_sub_fetch(&nbdzram_waiting, 1, __ATOMIC_RELAXED);
        nbdzram_back();
    }

    static int nbdzram_watches_count(void) {
        int count = 0;
        Watch* watch;
        for (watch = __atomic_load_n(&nbdzram_watches, __ATOMIC_ACQUIRE); watch; watch = watch->next) count++;
        return count;
    }
    static uint64_t nbdzram_calls_ever(void) {
        uint64_t calls = 0;
        Watch* watch;
        for (watch = __atomic_load_n(&nbdzram_watches, __ATOMIC_ACQUIRE); watch; watch = watch->next)
            calls += __atomic_load_n(&watch->calls, __ATOMIC_RELAXED);
        return calls;
    }
    """
    int nbdzram_watches_begin()
    int nbdzram_online()
    void nbdzram_offline()
    void nbdzram_quiescent_now()
    void nbdzram_away()
    void nbdzram_back()
    uint32_t nbdzram_thread_number()
    uint64_t nbdzram_grace_begin()
    int nbdzram_grace_over(uint64_t)
    void nbdzram_grace_wait(uint64_t)
    int nbdzram_watches_count()
    int nbdzram_waiting
    int nbdzram_refuses
    uint64_t nbdzram_epoch
    uint64_t nbdzram_calls_ever()

if nbdzram_watches_begin():
    raise MemoryError("no memory to watch over threads that read without a lock")


cdef bint online() noexcept nogil:
    """The thread begins to read, or a call within one does. False: there is no memory to watch it; it takes the
    locks."""
    return nbdzram_online()


cdef void offline() noexcept nogil:
    """The end of what `online` began."""
    nbdzram_offline()


cdef void quiescent() noexcept nogil:
    """The thread, which may be online, holds nothing at this moment."""
    nbdzram_quiescent_now()


cdef void away() noexcept nogil:
    """The thread, which may be online and holds nothing, is going to wait for somebody who may wait for a grace
    period."""
    nbdzram_away()


cdef void back() noexcept nogil:
    """The end of what `away` began."""
    nbdzram_back()


cdef uint64_t grace_begin() noexcept nogil:
    """A grace period begins, for all that is unreachable by now; its stamp."""
    return nbdzram_grace_begin()


cdef bint grace_over(uint64_t stamp) noexcept nogil:
    """Whether nobody can see any more what was unreachable when the grace period began."""
    return nbdzram_grace_over(stamp)


cdef void grace_wait(uint64_t stamp) noexcept nogil:
    """Wait for the end of a grace period. The caller holds neither the pool's lock nor a stripe, and nothing in a
    pool."""
    nbdzram_grace_wait(stamp)


cdef uint32_t thread_number() noexcept nogil:
    """A number that no other thread has that lives: small, as those of threads that ended are given again. It is a
    call."""
    return nbdzram_thread_number()


cdef uint64_t calls_ever() noexcept nogil:
    """Calls into all pools that took no lock, so far."""
    return nbdzram_calls_ever()


def stay_online(bint on, /) -> None:
    if not on:
        nbdzram_offline()
    elif not nbdzram_online():
        raise MemoryError


def refuse_watches(bint refuse, /) -> None:
    global nbdzram_refuses
    nbdzram_refuses = refuse


def watches() -> int:
    return nbdzram_watches_count()


def waiting() -> int:
    return nbdzram_waiting


def grace_periods() -> int:
    return nbdzram_epoch
