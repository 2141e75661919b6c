"""What an image would need: every block hashed, a sample compressed, nothing stored.

A block belongs to the sample when its fingerprint is a multiple of `sample`: a choice by content, so that a sampled
block's copies are all seen, and the share of duplicates comes out unbiased. Slots and pages are counted by the pool's
own size classes (slab.pyx).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer, Py_buffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from dataclasses import dataclass

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.codec cimport (
    BLOCK, fingerprint, lz4_compress, same_filled, zstd_compress, zstd_free_compressor, zstd_new_compressor,
)
from nbdzram.engine.page cimport PAGE_SIZE
from nbdzram.engine.slab cimport MAX_CLASSES, SizeClass, Slab
from nbdzram.engine.store cimport HUGE_LENGTH

from nbdzram.errors import UserError

cdef enum:
    LZ4 = 0
    ZSTD = 1
    ALL = 0
    DISTINCT = 1

CODECS = ("lz4", "zstd")


@dataclass(frozen=True, slots=True)
class Need:
    """See estimate.pyi."""

    compressed: int
    distinct: int
    memory: int
    memory_folded: int


@dataclass(frozen=True, slots=True)
class Figures:
    """See estimate.pyi."""

    blocks: int
    same_filled: int
    objects: int
    distinct_objects: int
    needs: dict[str, Need]


@cython.final
cdef class Estimate:
    """See estimate.pyi."""

    cdef Slab slab                      # for its size classes
    cdef void* compressor
    cdef uint32_t sample
    cdef uint64_t blocks, same, objects
    cdef uint64_t counted[2]            # sampled objects, all and distinct
    cdef uint64_t size[2][2]            # by codec, all and distinct: bytes
    cdef uint64_t slots[2][2][MAX_CLASSES]
    cdef uint64_t* known                # fingerprints of sampled blocks: open addressing, 0 is none
    cdef uint64_t capacity, used

    def __cinit__(self, *, level: int = 3, sample: int = 1):
        if not 1 <= level <= 22:
            raise UserError(f"Zstandard level {level} is outside 1 .. 22")
        if not 1 <= sample <= 1 << 20:
            raise UserError(f"a sample of one in {sample} blocks is outside 1 .. {1 << 20}")
        self.slab = Slab(Arena(None, 1 << 24))
        self.sample = sample
        self.compressor = zstd_new_compressor(level)
        self.capacity = 1 << 16
        self.known = <uint64_t*>calloc(self.capacity, 8)
        if self.compressor == NULL or self.known == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.compressor != NULL:
            zstd_free_compressor(self.compressor)
        free(self.known)

    def feed(self, content) -> None:
        cdef Py_buffer view
        cdef uint8_t last[BLOCK]
        cdef uint64_t whole
        cdef bint fits = True
        PyObject_GetBuffer(content, &view, PyBUF_SIMPLE)
        try:
            whole = <uint64_t>view.len // BLOCK
            with nogil:
                fits = self._feed(<const uint8_t*>view.buf, whole)
                if <uint64_t>view.len % BLOCK:
                    memset(last, 0, BLOCK)
                    memcpy(last, <const uint8_t*>view.buf + whole * BLOCK, <uint64_t>view.len % BLOCK)
                    fits = fits and self._feed(last, 1)
        finally:
            PyBuffer_Release(&view)
        if not fits:
            raise MemoryError("too many distinct blocks for this machine's memory; give a larger sample divisor")

    def figures(self):
        if self.objects and not self.counted[ALL]:
            raise UserError(
                f"none of {self.objects} blocks is in a sample of one in {self.sample}, so nothing is known of them; "
                "give a smaller --sample"
            )
        factor = self.objects / self.counted[ALL] if self.counted[ALL] else 1.0
        return Figures(
            blocks=self.blocks,
            same_filled=self.same,
            objects=self.objects,
            distinct_objects=round(self.counted[DISTINCT] * factor),
            needs={name: self._need(codec, factor) for codec, name in enumerate(CODECS)},
        )

    def _need(self, int codec, double factor):
        return Need(
            compressed=round(self.size[codec][ALL] * factor),
            distinct=round(self.size[codec][DISTINCT] * factor),
            memory=self._memory(codec, ALL, factor),
            memory_folded=self._memory(codec, DISTINCT, factor),
        )

    def _memory(self, int codec, int which, double factor):
        """Pages of the zspages that so many slots of each class take, as Slab fills them."""
        cdef SizeClass* klass
        pages = 0
        for index in range(self.slab.class_count):
            klass = &self.slab.classes[index]
            slots = round(self.slots[codec][which][index] * factor)
            pages += slots // klass.slots * klass.pages
            pages += -(-(slots % klass.slots) * klass.size // PAGE_SIZE)
        return pages * PAGE_SIZE

    cdef bint _feed(self, const uint8_t* content, uint64_t count) noexcept nogil:
        cdef uint8_t encoded[BLOCK + 512]
        cdef uint64_t index, word
        cdef uint32_t lz4_length, zstd_length
        cdef bint fresh
        for index in range(count):
            self.blocks += 1
            if same_filled(content + index * BLOCK, &word):
                self.same += 1
                continue
            self.objects += 1
            word = fingerprint(content + index * BLOCK, 0)
            if word % self.sample:
                continue
            if (self.used + 1) * 4 > self.capacity * 3 and not self._grow():
                return False
            fresh = self._add(word or 1)
            lz4_length = lz4_compress(content + index * BLOCK, encoded, HUGE_LENGTH + 64)
            if lz4_length == 0 or lz4_length >= HUGE_LENGTH:
                lz4_length = BLOCK
            zstd_length = zstd_compress(self.compressor, NULL, content + index * BLOCK, encoded, lz4_length)
            if zstd_length == 0 or not self.slab.saves(lz4_length, zstd_length):
                zstd_length = lz4_length
            self._count(LZ4, lz4_length, fresh)
            self._count(ZSTD, zstd_length, fresh)
            self.counted[ALL] += 1
            self.counted[DISTINCT] += fresh
        return True

    cdef void _count(self, int codec, uint32_t length, bint fresh) noexcept nogil:
        self.size[codec][ALL] += length
        self.slots[codec][ALL][self.slab.class_of[length]] += 1
        if fresh:
            self.size[codec][DISTINCT] += length
            self.slots[codec][DISTINCT][self.slab.class_of[length]] += 1

    cdef bint _add(self, uint64_t word) noexcept nogil:
        """Remember a fingerprint. True when it is new."""
        cdef uint64_t place = (word // self.sample) & (self.capacity - 1)
        while self.known[place]:
            if self.known[place] == word:
                return False
            place = (place + 1) & (self.capacity - 1)
        self.known[place] = word
        self.used += 1
        return True

    cdef bint _grow(self) noexcept nogil:
        cdef uint64_t* old = self.known
        cdef uint64_t old_capacity = self.capacity
        cdef uint64_t index
        cdef uint64_t* grown = <uint64_t*>calloc(old_capacity * 2, 8)
        if grown == NULL:
            return False
        self.known = grown
        self.capacity = old_capacity * 2
        self.used = 0
        for index in range(old_capacity):
            if old[index]:
                self._add(old[index])
        free(old)
        return True
