"""C entry points of the compressors and the hash, found once at import.

LZ4, XXH3 and Zstandard are neither written nor vendored here. The wheels lz4, xxhash and zstandard carry the C
libraries; dlopen of the wheel's own extension module reaches their functions, also where the wheel is linked to a
system library (dlsym looks through what the module depends on). Failing that, the system library. Each is proved by a
round trip against the wheel's Python API before the first block is stored.

Zstandard frames are written without the magic number, content size, checksum and dictionary number: a block's size is
known and its cell names the dictionary (ZSTD_f_zstd1_magicless; RFC 8878 section 3.1.1).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

import importlib.util
import os

import lz4.block
import xxhash
import zstandard

from nbdzram.errors import CodecUnavailable

cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    int RTLD_NOW, RTLD_LOCAL

ctypedef int (*lz4_compress_fn)(const char*, char*, int, int, int) noexcept nogil
ctypedef int (*lz4_decompress_fn)(const char*, char*, int, int) noexcept nogil
ctypedef uint64_t (*xxh3_fn)(const void*, size_t, uint64_t) noexcept nogil
ctypedef void* (*new_fn)() noexcept nogil
ctypedef size_t (*free_fn)(void*) noexcept nogil
ctypedef size_t (*set_fn)(void*, int, int) noexcept nogil
ctypedef size_t (*reset_fn)(void*, int) noexcept nogil
ctypedef size_t (*ref_fn)(void*, const void*) noexcept nogil
ctypedef size_t (*codec_fn)(void*, void*, size_t, const void*, size_t) noexcept nogil
ctypedef void* (*cdict_fn)(const void*, size_t, int) noexcept nogil
ctypedef void* (*ddict_fn)(const void*, size_t) noexcept nogil
ctypedef unsigned int (*error_fn)(size_t) noexcept nogil
ctypedef size_t (*train_fn)(void*, size_t, const void*, const size_t*, unsigned int) noexcept nogil

cdef lz4_compress_fn LZ4_compress_fast
cdef lz4_decompress_fn LZ4_decompress_safe
cdef xxh3_fn XXH3_64bits_withSeed
cdef new_fn ZSTD_createCCtx, ZSTD_createDCtx
cdef free_fn ZSTD_freeCCtx, ZSTD_freeDCtx, ZSTD_freeCDict, ZSTD_freeDDict
cdef set_fn ZSTD_CCtx_setParameter, ZSTD_DCtx_setParameter
cdef reset_fn ZSTD_CCtx_reset
cdef ref_fn ZSTD_CCtx_refCDict, ZSTD_DCtx_refDDict
cdef codec_fn ZSTD_compress2, ZSTD_decompressDCtx
cdef cdict_fn ZSTD_createCDict
cdef ddict_fn ZSTD_createDDict
cdef error_fn ZSTD_isError
cdef train_fn ZDICT_trainFromBuffer

cdef enum:
    # zstd.h: parameters and values that are stable by number.
    ZSTD_c_compressionLevel = 100
    ZSTD_c_contentSizeFlag = 200
    ZSTD_c_checksumFlag = 201
    ZSTD_c_dictIDFlag = 202
    ZSTD_c_format = 10
    ZSTD_d_format = 1000
    ZSTD_reset_session_only = 1
    ZSTD_f_zstd1_magicless = 1

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <stddef.h>
    /* A thread that decodes keeps its context: what all shared would be the lock that readers do without. */
    static __thread void* nbdzram_decoder = NULL;
    static pthread_key_t nbdzram_decoder_key;
    static size_t (*nbdzram_decoder_free)(void*);
    static void nbdzram_decoder_left(void* decoder) {  /* its thread ended */
        nbdzram_decoder = NULL;
        nbdzram_decoder_free(decoder);
    }
    static int nbdzram_decoders_begin(void) { return pthread_key_create(&nbdzram_decoder_key, nbdzram_decoder_left); }
    static void nbdzram_decoder_keep(void* decoder) {  /* unheard of at the thread's end it would stay: 100 KB */
        if (pthread_setspecific(nbdzram_decoder_key, decoder) == 0) nbdzram_decoder = decoder;
    }
    """
    void* nbdzram_decoder
    free_fn nbdzram_decoder_free
    int nbdzram_decoders_begin()
    void nbdzram_decoder_keep(void*)

if nbdzram_decoders_begin():
    raise MemoryError("no memory for the decoders of threads")


cdef uint64_t fingerprint(const uint8_t* block, uint64_t seed) noexcept nogil:
    """64 bits of XXH3 over a block's uncompressed content."""
    return XXH3_64bits_withSeed(block, BLOCK, seed)


cdef uint64_t digest(const uint8_t* bytes, size_t length, uint64_t seed) noexcept nogil:
    """64 bits of XXH3 over anything else: a dictionary, an entry of the export directory."""
    return XXH3_64bits_withSeed(bytes, length, seed)


cdef int lz4_compress(const uint8_t* block, uint8_t* target, int capacity) noexcept nogil:
    """Compressed length in bytes, or 0 when it does not fit `capacity`."""
    return LZ4_compress_fast(<const char*>block, <char*>target, BLOCK, capacity, 1)


cdef bint lz4_decompress(const uint8_t* source, int length, uint8_t* block) noexcept nogil:
    """Decode one block. False when the bytes are not one; never writes past the block."""
    return LZ4_decompress_safe(<const char*>source, <char*>block, length, BLOCK) == BLOCK


cdef bint same_filled(const uint8_t* block, uint64_t* word) noexcept nogil:
    """Whether the block, at any address, repeats its first 8-byte word.

    Both ends are looked at first, as most blocks differ there; then whether it equals itself a word further on.
    """
    cdef uint64_t first, last
    memcpy(&first, block, 8)
    memcpy(&last, block + BLOCK - 8, 8)
    if first != last or memcmp(block, block + 8, BLOCK - 8) != 0:
        return False
    word[0] = first
    return True


cdef bint is_zero(const uint8_t* bytes, uint32_t count) noexcept nogil:
    cdef uint32_t index
    for index in range(count):
        if bytes[index]:
            return False
    return True


cdef void fill(uint8_t* target, uint64_t length, uint64_t word, uint64_t phase) noexcept nogil:
    """Repeat a word over `target`, beginning with its byte `phase` (0..7)."""
    cdef uint64_t turned = word
    cdef uint64_t index
    if phase:
        turned = (word >> (8 * phase)) | (word << (64 - 8 * phase))
    for index in range(length // 8):
        memcpy(target + 8 * index, &turned, 8)
    memcpy(target + (length & ~<uint64_t>7), &turned, length & 7)


cdef void* zstd_new_compressor(int level) noexcept nogil:
    """A compression context, or NULL."""
    cdef void* context = ZSTD_createCCtx()
    if context == NULL:
        return NULL
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level)
    ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0)
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 0)
    ZSTD_CCtx_setParameter(context, ZSTD_c_dictIDFlag, 0)
    ZSTD_CCtx_setParameter(context, ZSTD_c_format, ZSTD_f_zstd1_magicless)
    return context


cdef void zstd_free_compressor(void* context) noexcept nogil:
    ZSTD_freeCCtx(context)


cdef int zstd_compress(
    void* context, const void* cdict, const uint8_t* block, uint8_t* target, int capacity
) noexcept nogil:
    """Compressed length in bytes, or 0 when it does not fit `capacity`. cdict may be NULL."""
    cdef size_t length
    # A frame that did not fit leaves the context in its middle, where it refuses another dictionary and keeps the old
    # one.
    ZSTD_CCtx_reset(context, ZSTD_reset_session_only)
    if ZSTD_isError(ZSTD_CCtx_refCDict(context, cdict)):
        return 0
    length = ZSTD_compress2(context, target, capacity, block, BLOCK)
    return 0 if ZSTD_isError(length) else <int>length


cdef bint zstd_decompress(const void* ddict, const uint8_t* source, int length, uint8_t* block) noexcept nogil:
    """Decode one block with or without a digested dictionary. False when the bytes are not one."""
    cdef void* context = nbdzram_decoder
    cdef size_t decoded = 0
    if context == NULL:
        context = ZSTD_createDCtx()
        if context == NULL:
            return False
        ZSTD_DCtx_setParameter(context, ZSTD_d_format, ZSTD_f_zstd1_magicless)
        nbdzram_decoder_keep(context)
    if not ZSTD_isError(ZSTD_DCtx_refDDict(context, ddict)):
        decoded = ZSTD_decompressDCtx(context, block, BLOCK, source, length)
    if context != nbdzram_decoder:
        ZSTD_freeDCtx(context)
    return decoded == BLOCK


cdef void* zstd_new_cdict(const uint8_t* content, size_t length, int level) noexcept nogil:
    return ZSTD_createCDict(content, length, level)


cdef void zstd_free_cdict(void* cdict) noexcept nogil:
    if cdict != NULL:
        ZSTD_freeCDict(cdict)


cdef void* zstd_new_ddict(const uint8_t* content, size_t length) noexcept nogil:
    return ZSTD_createDDict(content, length)


cdef void zstd_free_ddict(void* ddict) noexcept nogil:
    if ddict != NULL:
        ZSTD_freeDDict(ddict)


cdef size_t zstd_train(uint8_t* target, size_t capacity, const uint8_t* samples, uint32_t count) noexcept nogil:
    """Train a dictionary from `count` adjacent blocks. Its length in bytes, or 0 when they yield none."""
    cdef size_t* sizes = <size_t*>malloc(count * sizeof(size_t))
    cdef size_t length
    cdef uint32_t index
    if sizes == NULL:
        return 0
    for index in range(count):
        sizes[index] = BLOCK
    length = ZDICT_trainFromBuffer(target, capacity, samples, sizes, count)
    free(sizes)
    return 0 if ZSTD_isError(length) else length


cdef void* _find(void* library, str symbol) except NULL:
    cdef bytes name = symbol.encode()
    cdef void* found = dlsym(library, name)
    if found == NULL:
        raise LookupError(symbol)
    return found


cdef void* _open(str package, list modules, str system, str probe) except NULL:
    """The first library that has `probe`: an extension module of the wheel, or the system's."""
    cdef void* library
    cdef bytes where, name = probe.encode()
    candidates = [spec.origin for spec in map(importlib.util.find_spec, modules) if spec and spec.origin]
    for candidate in [*candidates, system]:
        where = os.fsencode(candidate)
        library = dlopen(where, RTLD_NOW | RTLD_LOCAL)
        if library != NULL and dlsym(library, name) != NULL:
            return library
    raise CodecUnavailable(
        f"no library offers {probe}: looked into {', '.join(candidates) or package} and {system}; "
        f"reinstall the {package} wheel (pip install --force-reinstall {package}) or install {system}"
    )


def _resolve() -> None:
    global LZ4_compress_fast, LZ4_decompress_safe, XXH3_64bits_withSeed
    global nbdzram_decoder_free
    global ZSTD_createCCtx, ZSTD_createDCtx, ZSTD_freeCCtx, ZSTD_freeDCtx, ZSTD_freeCDict, ZSTD_freeDDict
    global ZSTD_CCtx_setParameter, ZSTD_DCtx_setParameter, ZSTD_CCtx_refCDict, ZSTD_DCtx_refDDict, ZSTD_CCtx_reset
    global ZSTD_compress2, ZSTD_decompressDCtx, ZSTD_createCDict, ZSTD_createDDict, ZSTD_isError
    global ZDICT_trainFromBuffer
    cdef void* library = _open("lz4", ["lz4.block._block"], "liblz4.so.1", "LZ4_compress_fast")
    LZ4_compress_fast = <lz4_compress_fn>_find(library, "LZ4_compress_fast")
    LZ4_decompress_safe = <lz4_decompress_fn>_find(library, "LZ4_decompress_safe")
    library = _open("xxhash", ["xxhash._xxhash"], "libxxhash.so.0", "XXH3_64bits_withSeed")
    # Not xxHash's own dispatch, though the wheel has it: it takes AVX-512, which hashes a block in 118 ns instead of
    # 208 and lowers the processor's clock for all that follows. A write of 256 KiB took 123 to 145 us instead of 97.
    XXH3_64bits_withSeed = <xxh3_fn>_find(library, "XXH3_64bits_withSeed")
    library = _open("zstandard", ["zstandard.backend_c", "zstandard._cffi"], "libzstd.so.1", "ZSTD_compress2")
    ZSTD_createCCtx = <new_fn>_find(library, "ZSTD_createCCtx")
    ZSTD_createDCtx = <new_fn>_find(library, "ZSTD_createDCtx")
    ZSTD_freeCCtx = <free_fn>_find(library, "ZSTD_freeCCtx")
    ZSTD_freeDCtx = <free_fn>_find(library, "ZSTD_freeDCtx")
    nbdzram_decoder_free = ZSTD_freeDCtx
    ZSTD_freeCDict = <free_fn>_find(library, "ZSTD_freeCDict")
    ZSTD_freeDDict = <free_fn>_find(library, "ZSTD_freeDDict")
    ZSTD_CCtx_setParameter = <set_fn>_find(library, "ZSTD_CCtx_setParameter")
    ZSTD_DCtx_setParameter = <set_fn>_find(library, "ZSTD_DCtx_setParameter")
    ZSTD_CCtx_reset = <reset_fn>_find(library, "ZSTD_CCtx_reset")
    ZSTD_CCtx_refCDict = <ref_fn>_find(library, "ZSTD_CCtx_refCDict")
    ZSTD_DCtx_refDDict = <ref_fn>_find(library, "ZSTD_DCtx_refDDict")
    ZSTD_compress2 = <codec_fn>_find(library, "ZSTD_compress2")
    ZSTD_decompressDCtx = <codec_fn>_find(library, "ZSTD_decompressDCtx")
    ZSTD_createCDict = <cdict_fn>_find(library, "ZSTD_createCDict")
    ZSTD_createDDict = <ddict_fn>_find(library, "ZSTD_createDDict")
    ZSTD_isError = <error_fn>_find(library, "ZSTD_isError")
    ZDICT_trainFromBuffer = <train_fn>_find(library, "ZDICT_trainFromBuffer")


def compress_lz4(bytes block) -> bytes:
    """One block's LZ4 encoding as the pool stores it, also when longer than the huge threshold."""
    cdef uint8_t target[BLOCK + 32]  # LZ4_COMPRESSBOUND(4096) is 4128
    assert len(block) == BLOCK
    return target[:lz4_compress(block, target, BLOCK + 32)]


def decompress_lz4(bytes encoded) -> bytes:
    """The block that `encoded` stands for. Raises ValueError when it is none."""
    cdef uint8_t block[BLOCK]
    if not lz4_decompress(encoded, <int>len(encoded), block):
        raise ValueError(f"{len(encoded)} bytes are not an LZ4 block of {BLOCK}")
    return block[:BLOCK]


def compress_zstd(bytes block, int level = 3) -> bytes:
    """One block's Zstandard encoding, magicless."""
    cdef uint8_t target[BLOCK + 512]
    assert len(block) == BLOCK
    cdef void* context = zstd_new_compressor(level)
    if context == NULL:
        raise MemoryError
    length = zstd_compress(context, NULL, block, target, BLOCK + 512)
    zstd_free_compressor(context)
    return target[:length]


def decompress_zstd(bytes encoded) -> bytes:
    """The block that a magicless frame stands for. Raises ValueError when it is none."""
    cdef uint8_t block[BLOCK]
    if not zstd_decompress(NULL, encoded, <int>len(encoded), block):
        raise ValueError(f"{len(encoded)} bytes are not a Zstandard block of {BLOCK}")
    return block[:BLOCK]


def fingerprint_of(bytes block, uint64_t seed = 0) -> int:
    """XXH3, 64 bits, of one block."""
    assert len(block) == BLOCK
    return fingerprint(block, seed)


def digest_of(const uint8_t[::1] content not None, uint64_t seed) -> int:
    """XXH3, 64 bits, of anything."""
    return digest(&content[0], len(content), seed) if len(content) else digest(NULL, 0, seed)


def _prove() -> None:
    """A round trip of each codec against the wheel's Python API, both ways."""
    block = (bytes(range(256)) * 7 + os.urandom(512) + b"nbdzram " * 224)[:BLOCK]
    frames = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    proofs = {
        "lz4": lz4.block.decompress(compress_lz4(block), uncompressed_size=BLOCK) == block
        and decompress_lz4(lz4.block.compress(block, store_size=False)) == block,
        "xxhash": xxhash.xxh3_64_intdigest(block, 7) == fingerprint_of(block, 7),
        "zstandard": frames.decompress(compress_zstd(block), max_output_size=BLOCK) == block
        and decompress_zstd(compress_zstd(block)) == block,
    }
    for package, proved in proofs.items():
        if not proved:
            raise CodecUnavailable(
                f"the C functions of {package} disagree with its Python API; "
                f"reinstall it (pip install --force-reinstall {package})"
            )


_resolve()
_prove()
