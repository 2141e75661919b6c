from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    BLOCK = 4096

    # How an object's bytes are to be read; stored in its handle's cell (cells.pxd), so never renumbered.
    CODEC_FREE = 0
    CODEC_RAW = 1
    CODEC_LZ4 = 2
    CODEC_ZSTD = 3
    CODEC_ZSTD_DICT = 4  # with dictionary 0; 5, 6 and 7 with dictionaries 1, 2 and 3
    CODEC_DICTS = 4

cdef uint64_t fingerprint(const uint8_t* block, uint64_t seed) noexcept nogil
cdef uint64_t digest(const uint8_t* bytes, size_t length, uint64_t seed) noexcept nogil
cdef int lz4_compress(const uint8_t* block, uint8_t* target, int capacity) noexcept nogil
cdef bint lz4_decompress(const uint8_t* source, int length, uint8_t* block) noexcept nogil
cdef bint same_filled(const uint8_t* block, uint64_t* word) noexcept nogil
cdef bint is_zero(const uint8_t* bytes, uint32_t count) noexcept nogil
cdef void fill(uint8_t* target, uint64_t length, uint64_t word, uint64_t phase) noexcept nogil

# Zstandard works with contexts and digested dictionaries, all opaque.
cdef void* zstd_new_compressor(int level) noexcept nogil
cdef void zstd_free_compressor(void* context) noexcept nogil
cdef int zstd_compress(
    void* context, const void* cdict, const uint8_t* block, uint8_t* target, int capacity
) noexcept nogil
cdef bint zstd_decompress(const void* ddict, const uint8_t* source, int length, uint8_t* block) noexcept nogil
cdef void* zstd_new_cdict(const uint8_t* content, size_t length, int level) noexcept nogil
cdef void zstd_free_cdict(void* cdict) noexcept nogil
cdef void* zstd_new_ddict(const uint8_t* content, size_t length) noexcept nogil
cdef void zstd_free_ddict(void* ddict) noexcept nogil
cdef size_t zstd_train(uint8_t* target, size_t capacity, const uint8_t* samples, uint32_t count) noexcept nogil
