/* What threads take from each other's memory, counted: a runtime for code that gcc instrumented for its thread sanitizer
   (-fsanitize=thread), in the place of the sanitizer's own. Loaded with LD_PRELOAD; see sharing.py.

   Each thread that is watched has a cache without limits, and the caches agree. A line of memory that a thread reads or
   writes and another one wrote since, or that it writes and others have, is a miss that they owe to each other; a line
   that nobody touched before is none. The compiler tells loads and stores of the instrumented code; locks of glibc are
   told here, and what glibc and LZ4 copy is not seen.

   Threads take turns (sharing.py), so a processor or two do for any number of them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define LINES (1u << 22)
#define PLACES (1u << 16)
#define NOBODY (-1)

typedef struct { uint64_t line, have; } Line;            /* a bit for each thread that has it as it is */
typedef struct { uint64_t place, misses; } Place;        /* by the address in the code behind the access */

static Line* lines;
static Place* places;
static uint64_t accesses;
static int counting, guard;
static __thread int number = NOBODY;

static int (*real_lock)(pthread_mutex_t*), (*real_unlock)(pthread_mutex_t*), (*real_trylock)(pthread_mutex_t*);

__attribute__((constructor)) static void begin(void) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    lines = mmap(NULL, LINES * sizeof(Line), PROT_READ | PROT_WRITE, flags, -1, 0);
    places = mmap(NULL, PLACES * sizeof(Place), PROT_READ | PROT_WRITE, flags, -1, 0);
    real_lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    real_unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    real_trylock = dlsym(RTLD_NEXT, "pthread_mutex_trylock");
}

/* What sharing.py calls. */
void sharing_watch(int thread) { number = thread; }
void sharing_count(int on) { counting = on; }
uint64_t sharing_accesses(void) { return accesses; }
int sharing_places(Place* into, int room) {
    int found = 0;
    for (uint32_t at = 0; at < PLACES && found < room; at++) if (places[at].misses) into[found++] = places[at];
    return found;
}

static uint32_t spread(uint64_t key) { return (uint32_t)(key * 0x9E3779B97F4A7C15ull >> 32); }

static void missed(uint64_t place) {
    uint32_t at = spread(place) % PLACES;
    while (places[at].misses && places[at].place != place) at = (at + 1) % PLACES;
    places[at].place = place;
    places[at].misses++;
}

static void touch_line(uint64_t line, int writes, uint64_t place) {
    uint64_t ours = 1ull << number;
    uint32_t at = spread(line) % LINES;
    while (lines[at].have && lines[at].line != line) at = (at + 1) % LINES;
    accesses += counting;
    if (counting && lines[at].have && (writes ? lines[at].have != ours : !(lines[at].have & ours))) missed(place);
    lines[at].line = line;
    lines[at].have = writes ? ours : lines[at].have | ours;
}

static void touch(const volatile void* address, unsigned long size, int writes, void* place) {
    if (number == NOBODY) return;
    while (__atomic_exchange_n(&guard, 1, __ATOMIC_ACQUIRE)) {}
    for (uint64_t line = (uint64_t)address / 64; line <= ((uint64_t)address + size - 1) / 64; line++)
        touch_line(line, writes, (uint64_t)place);
    __atomic_store_n(&guard, 0, __ATOMIC_RELEASE);
}

#define HERE __builtin_return_address(0)

int pthread_mutex_lock(pthread_mutex_t* mutex) { touch(mutex, 4, 1, HERE); return real_lock(mutex); }
int pthread_mutex_unlock(pthread_mutex_t* mutex) { touch(mutex, 4, 1, HERE); return real_unlock(mutex); }
int pthread_mutex_trylock(pthread_mutex_t* mutex) { touch(mutex, 4, 1, HERE); return real_trylock(mutex); }

/* What the compiler calls. */
void __tsan_init(void) {}
void __tsan_func_entry(void* caller) { (void)caller; }
void __tsan_func_exit(void) {}
void __tsan_read_range(void* address, unsigned long size) { if (size) touch(address, size, 0, HERE); }
void __tsan_write_range(void* address, unsigned long size) { if (size) touch(address, size, 1, HERE); }
void __tsan_atomic_thread_fence(int order) { (void)order; __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int order) { (void)order; }

#define ACCESS(kind, size, writes) \
    void __tsan_##kind##size(void* address) { touch(address, size, writes, HERE); }
#define ACCESSES(size) \
    ACCESS(read, size, 0) ACCESS(write, size, 1) ACCESS(unaligned_read, size, 0) ACCESS(unaligned_write, size, 1) \
    ACCESS(volatile_read, size, 0) ACCESS(volatile_write, size, 1)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)

#define CHANGE(bits, type, name, operation) \
    type __tsan_atomic##bits##_##name(volatile type* at, type by, int order) { \
        (void)order; touch(at, sizeof(type), 1, HERE); return operation(at, by, __ATOMIC_SEQ_CST); }
#define SWAP(bits, type, name) \
    int __tsan_atomic##bits##_##name(volatile type* at, type* old, type fresh, int order, int otherwise) { \
        (void)order; (void)otherwise; touch(at, sizeof(type), 1, HERE); \
        return __atomic_compare_exchange_n(at, old, fresh, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
#define ATOMICS(bits, type) \
    type __tsan_atomic##bits##_load(const volatile type* at, int order) { \
        (void)order; touch(at, sizeof(type), 0, HERE); return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile type* at, type fresh, int order) { \
        (void)order; touch(at, sizeof(type), 1, HERE); __atomic_store_n(at, fresh, __ATOMIC_SEQ_CST); } \
    CHANGE(bits, type, exchange, __atomic_exchange_n) CHANGE(bits, type, fetch_add, __atomic_fetch_add) \
    CHANGE(bits, type, fetch_sub, __atomic_fetch_sub) CHANGE(bits, type, fetch_and, __atomic_fetch_and) \
    CHANGE(bits, type, fetch_or, __atomic_fetch_or) CHANGE(bits, type, fetch_xor, __atomic_fetch_xor) \
    SWAP(bits, type, compare_exchange_strong) SWAP(bits, type, compare_exchange_weak)
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
