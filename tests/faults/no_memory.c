/* Refuses one allocation of the compiled data plane, and none of anybody else's: see no_memory.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

long no_memory_after = -1;  /* how many are granted before one that is not; -1: all are */
long no_memory_lasts = 0;   /* none is granted behind it */
long no_memory_refused = 0; /* so many were not */

static int is_refused(void* caller) {
    Dl_info found;
    if (no_memory_after < 0 || dladdr(caller, &found) == 0 || found.dli_fname == NULL)
        return 0;
    if (strstr(found.dli_fname, "/nbdzram/engine/") == NULL && strstr(found.dli_fname, "/nbdzram/sessions/") == NULL)
        return 0;
    if (no_memory_after > 0) {
        no_memory_after--;
        return 0;
    }
    if (!no_memory_lasts)
        no_memory_after = -1;
    no_memory_refused++;
    return 1;
}

void* malloc(size_t size) {
    return is_refused(__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void* calloc(size_t count, size_t size) {
    return is_refused(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}

void* realloc(void* place, size_t size) {
    return is_refused(__builtin_return_address(0)) ? NULL : __libc_realloc(place, size);
}

int posix_memalign(void** place, size_t alignment, size_t size) {
    if (is_refused(__builtin_return_address(0)))
        return ENOMEM;
    *place = __libc_memalign(alignment, size);
    return *place == NULL ? ENOMEM : 0;
}

void* mmap64(void* place, size_t size, int protection, int flags, int file, off64_t offset) {
    if (flags & MAP_ANONYMOUS && is_refused(__builtin_return_address(0))) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return (void*)syscall(SYS_mmap, place, size, protection, flags, file, offset);
}
