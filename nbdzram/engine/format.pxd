from libc.stdint cimport uint32_t, uint64_t

from nbdzram.engine.codec cimport CODEC_DICTS
from nbdzram.engine.page cimport UNIT_SIZE

cdef enum:
    VERSION = 2
    OLD_VERSION = 1  # is still opened, and becomes the other (upgrade.pyx)

    SEGMENTS_AT = 1 * UNIT_SIZE
    SEGMENTS_MAX = 65536
    EXPORTS_AT = 5 * UNIT_SIZE
    EXPORTS_MAX = 4096
    FIRST_UNITS = 37  # handed out when an arena begins: all that has a fixed place

    NAME_MAX = 255
    NAME_ROOM = 256
    HEADS = 2

    # What an export directory entry is; stored, so never renumbered.
    ENTRY_FREE = 0
    ENTRY_LIVE = 1
    ENTRY_DELETING = 2

    READ_ONLY_FLAG = 1

    # What an entry that says DELETING is beside that: an export that is not offered yet. Who knows nothing of it
    # deletes it.
    UNCONCEALED = 0
    CONCEALED_FILLING = 1  # none of it will ever be offered if the process is killed now
    CONCEALED_WHOLE = 2    # whoever remembers that it was to be offered may reveal it

    # What a word belongs to, so that one is never taken for another: levels of block tables (0 .. 4) come first.
    KEY_ROOT = 8
    KEY_FILL = 9
    KEY_DICTIONARY = 10
    KEY_STRENGTH = 11
    KEY_CURRENT = 12
    KEY_IDENTITY = 13

    CHECK_MASK = 0xFFFF  # of a word with a check of 16 bits

cdef struct Superblock:
    char magic[8]        # the last to be written, by one store
    uint32_t version
    uint32_t page_size
    uint64_t seed
    uint64_t layout
    uint32_t old_unit[4]      # format 1 had its dictionaries here, and the strength of recompression behind them
    uint32_t old_length[4]
    uint64_t old_strength
    uint64_t features         # what a program must know to open the arena, a bit each; there are none yet
    uint64_t identity         # checks all that never changes: page_size, seed, layout, features
    uint64_t dictionary[CODEC_DICTS]  # unit 63..36 | length 35..16 | check 15..0; 0: none
    uint64_t digest[CODEC_DICTS]      # XXH3 of its bytes, written before its word
    uint64_t strength         # of the strongest recompression: value 63..16 | check 15..0

cdef extern from * nogil:
    """
    #include <stdint.h>
    /* A folded multiplication: 64 bits that hang on all of a and b. For finding damage, not for keeping out an enemy:
       whoever can write into an arena can also write what he likes into its blocks. */
    static inline uint64_t nbdzram_mix(uint64_t a, uint64_t b) {
        __uint128_t product = (__uint128_t)(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD6E8FEB86659FD93ull);
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    uint64_t mix "nbdzram_mix" (uint64_t, uint64_t)

cdef inline uint64_t check_of(uint64_t seed, uint32_t key, uint64_t number, uint64_t value) noexcept nogil:
    """64 bits that tell whether `value` belongs to word `number` of a kind, in this pool."""
    return mix(mix(seed ^ <uint64_t>key << 56, number) ^ value, seed + key)

cdef inline uint64_t checked_word(uint64_t seed, uint32_t key, uint64_t number, uint64_t value) noexcept nogil:
    """48 bits of value, with 16 that check them; never 0."""
    cdef uint64_t check = check_of(seed, key, number, value) & CHECK_MASK
    return value << 16 | (check if check else 1)

cdef inline bint is_checked(uint64_t seed, uint32_t key, uint64_t number, uint64_t word) noexcept nogil:
    return word == checked_word(seed, key, number, word >> 16)

cdef uint64_t identity_of(const Superblock* block) noexcept nogil
cdef uint64_t dictionary_word(
    uint64_t seed, uint32_t number, uint32_t unit, uint32_t length, uint64_t digest
) noexcept nogil

cdef inline uint32_t dictionary_unit(const Superblock* block, int number) noexcept nogil:
    return <uint32_t>(block.dictionary[number] >> 36)

cdef inline uint32_t dictionary_length(const Superblock* block, int number) noexcept nogil:
    return <uint32_t>(block.dictionary[number] >> 16) & 0xFFFFF
