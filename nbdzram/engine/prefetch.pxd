# Memory asked for before it is wanted: a hint, which changes nothing and cannot fail, whatever the address.

cdef extern from * nogil:
    """
    #define nbdzram_prefetch(place) __builtin_prefetch(place)
    #define nbdzram_prefetch_to_write(place) __builtin_prefetch(place, 1)
    """
    void prefetch "nbdzram_prefetch" (const void* place)
    void prefetch_to_write "nbdzram_prefetch_to_write" (const void* place)
