# Memory asked for before it is wanted: a hint, which changes nothing and cannot fail, whatever the address.

cdef extern from * nogil:
    """
    #define nbdzram_prefetch(place) __builtin_prefetch(place)

    /* A line of more than the first cache has room for: to the second, which fetches more of them at a time as well. */
    #define nbdzram_prefetch_aside(place) __builtin_prefetch(place, 0, 2)

    /* A line that is written soon: without other processors' copies of it. For a baseline x86-64 the compiler makes a
       read of it, though every such processor knows the instruction, or takes it for none. */
    static inline void nbdzram_prefetch_to_write(const void* place) {
    #ifdef __x86_64__
        __asm__ volatile("prefetchw %0" : : "m"(*(const char*)place));
    #else
        __builtin_prefetch(place, 1);
    #endif
    }
    """
    void prefetch "nbdzram_prefetch" (const void* place)
    void prefetch_aside "nbdzram_prefetch_aside" (const void* place)
    void prefetch_to_write "nbdzram_prefetch_to_write" (const void* place)
