"""What stands at fixed places in an arena, and the checks that stand beside it.

    unit 0       superblock
    units 1-4    directory of cell segments: 65,536 numbers of units
    units 5-36   export directory: 4,096 entries of 512 bytes (directory.pyx)
    units 37-    zspages | block table nodes | cell segments | dictionaries      as they are asked for

Nothing in an arena is believed that was not checked. What is written once has a checksum; what changes while the arena
is in use changes by one store of one word, so that word carries its check in itself:

    superblock          identity: 64 bits over what never changes; a check of 16 bits in each word that does
    dictionary          64 bits over its bytes, which its word in the superblock checks in turn
    directory entry     64 bits, in two heads of which one word says which counts (directory.pyx)
    table entry         16 bits in a leaf, 32 in a branch (table.pyx)
    object              the 64 bits of its block's fingerprint (cells.pyx)
    repeated word       the entry's 16 bits; in a cell 32 (cells.pyx)

A check hangs on the pool's seed and on the place, so that what was copied from elsewhere is seen as well. Checks find
damage by accident: whoever can write into the arena can write whatever he likes.

A program opens an arena if it knows its version and each of its features. Format 1 had no checks but the fingerprints;
it is read as it is once, and becomes format 2 by one store of the version (upgrade.pyx).
"""

from libc.stdint cimport uint32_t, uint64_t


cdef uint64_t identity_of(const Superblock* block) noexcept nogil:
    """What `identity` is to be."""
    cdef uint64_t found = mix(block.seed, block.layout)
    found = mix(found, <uint64_t>block.version << 32 | block.page_size)
    return mix(found, block.features) | 1


cdef uint64_t dictionary_word(
    uint64_t seed, uint32_t number, uint32_t unit, uint32_t length, uint64_t digest
) noexcept nogil:
    """What names a dictionary: where it is, and a check that binds its digest, too."""
    return checked_word(seed ^ digest, KEY_DICTIONARY, number, <uint64_t>unit << 20 | length)
