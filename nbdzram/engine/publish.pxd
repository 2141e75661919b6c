from libc.stdint cimport uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    /* What readers without a lock look at is looked at and changed by these alone: a word at a time, whole, and
       after a look everything that its publication came after is seen too. amend is for what no kill has to be held
       against: counts in a word, nodes that nothing names yet, and words outside an arena. Whoever changes something
       has the pool's lock alone, or changes what is its own beside others (beside.pyx); for ages, exchange64. */
    static inline uint64_t nbdzram_look64(const uint64_t* place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    static inline uint32_t nbdzram_look32(const uint32_t* place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    static inline void nbdzram_amend64(uint64_t* place, uint64_t value) {
        __atomic_store_n(place, value, __ATOMIC_RELEASE);
    }
    static inline void nbdzram_amend32(uint32_t* place, uint32_t value) {
        __atomic_store_n(place, value, __ATOMIC_RELEASE);
    }
    static inline int nbdzram_exchange64(uint64_t* place, uint64_t old, uint64_t value) {
        return __atomic_compare_exchange_n(place, &old, value, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
    static inline int nbdzram_exchange32(uint32_t* place, uint32_t old, uint32_t value) {
        return __atomic_compare_exchange_n(place, &old, value, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
    static inline uint64_t nbdzram_subtract64(uint64_t* place, uint64_t less) {  /* what it was before */
        return __atomic_fetch_sub(place, less, __ATOMIC_ACQ_REL);
    }
    static inline void nbdzram_add64(uint64_t* place, uint64_t more) {
        __atomic_fetch_add(place, more, __ATOMIC_RELAXED);
    }
    static inline void nbdzram_add32(uint32_t* place, uint32_t more) {
        __atomic_fetch_add(place, more, __ATOMIC_RELAXED);
    }
    static inline int nbdzram_exchange8(void* place, uint8_t old, uint8_t value) {
        return __atomic_compare_exchange_n((uint8_t*)place, &old, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
    static inline int nbdzram_claim_bit(void* place, int number) {  /* whether nobody had set it */
        return !(__atomic_fetch_or((uint8_t*)place, (uint8_t)(1 << number), __ATOMIC_RELAXED) >> number & 1);
    }
    static inline void nbdzram_set_bits(void* place, uint8_t bits) {
        __atomic_fetch_or((uint8_t*)place, bits, __ATOMIC_RELAXED);
    }
    static inline void nbdzram_clear_bits(void* place, uint8_t bits) {
        __atomic_fetch_and((uint8_t*)place, (uint8_t)~bits, __ATOMIC_RELAXED);
    }
    static inline uint8_t nbdzram_look8(const void* place) {
        return __atomic_load_n((const uint8_t*)place, __ATOMIC_RELAXED);
    }
    static inline void nbdzram_amend8(void* place, uint8_t value) {
        __atomic_store_n((uint8_t*)place, value, __ATOMIC_RELAXED);
    }
    static inline void nbdzram_tally(uint64_t* place) { __atomic_fetch_add(place, 1, __ATOMIC_RELAXED); }
    """
    uint64_t look64 "nbdzram_look64" (const uint64_t* place)
    uint32_t look32 "nbdzram_look32" (const uint32_t* place)
    void amend64 "nbdzram_amend64" (uint64_t* place, uint64_t value)
    void amend32 "nbdzram_amend32" (uint32_t* place, uint32_t value)
    bint exchange64 "nbdzram_exchange64" (uint64_t* place, uint64_t old, uint64_t value)
    bint exchange32 "nbdzram_exchange32" (uint32_t* place, uint32_t old, uint32_t value)
    uint64_t subtract64 "nbdzram_subtract64" (uint64_t* place, uint64_t less)
    void add64 "nbdzram_add64" (uint64_t* place, uint64_t more)
    void add32 "nbdzram_add32" (uint32_t* place, uint32_t more)
    bint exchange8 "nbdzram_exchange8" (void* place, unsigned char old, unsigned char value)
    bint claim_bit "nbdzram_claim_bit" (void* place, int number)
    void set_bits "nbdzram_set_bits" (void* place, unsigned char bits)
    void clear_bits "nbdzram_clear_bits" (void* place, unsigned char bits)
    unsigned char look8 "nbdzram_look8" (const void* place)
    void amend8 "nbdzram_amend8" (void* place, unsigned char value)
    void tally "nbdzram_tally" (uint64_t* place)

cdef void publish64(uint64_t* place, uint64_t value) noexcept nogil
cdef void publish32(uint32_t* place, uint32_t value) noexcept nogil
cdef void step_aside() noexcept nogil
