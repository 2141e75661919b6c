# Folding domains: whose blocks may share objects with whose.
#
#     domain 0           all exports that are not private
#     domain 1 .. 65535  a private export, with its clones and theirs
#
# A domain's number stands in the flags of its exports' directory entries, and shows in what an object is found by:
#
#     fingerprint = XXH3(content) xor salt(domain)
#
# Equal content of two domains has the same hash and never the same fingerprint. Since only objects with the same
# fingerprint are ever compared, those of two domains never share, in a fold or at the write, and nothing else has to
# know of domains. An object does not say which is its own; whoever holds its bytes against its fingerprint accepts any
# number that a domain can have (is_fingerprint_of), which costs the check 16 of its 64 bits.

from libc.stdint cimport uint32_t, uint64_t

cdef extern from * nogil:
    """
    #define NBDZRAM_SALT 0x9E3779B97F4A7C15u      /* odd, so that it has an inverse: 2^64 over the golden ratio */
    #define NBDZRAM_UNSALT 0xF1DE83E19937733Du    /* ... modulo 2^64 */
    """
    const uint64_t SALT "NBDZRAM_SALT"
    const uint64_t UNSALT "NBDZRAM_UNSALT"

cdef enum:
    COMMON_DOMAIN = 0
    DOMAINS = 1 << 16
    DOMAIN_SHIFT = 16  # of its number, in the flags of a directory entry

cdef inline uint32_t domain_of(uint32_t flags) noexcept nogil:
    return flags >> DOMAIN_SHIFT

cdef inline uint64_t salt_of(uint32_t domain) noexcept nogil:
    return domain * SALT

cdef inline bint is_fingerprint_of(uint64_t found, uint64_t hashed) noexcept nogil:
    """Whether a fingerprint is that of content with this hash, in whatever domain."""
    return (found ^ hashed) * UNSALT < DOMAINS
