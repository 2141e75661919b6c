"""Reading what can be read of an arena that nobody could open, and changing nothing.

    export directory ─> root ─> nodes ─> entries ─> cells ─> objects ─> decoded, and held against their fingerprints

Opening refuses an arena whose tables are not what was written, as nobody could serve it rightly. This takes one export
at a time and goes as far as words are right: each leads to what it checks, or what is below it is missing and told so.
No word is believed that lies behind the end, and no block is given out that is not the one that was written.

The file is mapped for reading alone. Nothing is counted and nothing is rebuilt: whatever is believed here is checked
here.
"""

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.cells cimport KIND_FILL, KIND_FORWARD, SEGMENT_CELLS, SEGMENT_UNITS, kind_of, length_of, target_of
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, digest, zstd_new_ddict
from nbdzram.engine.directory cimport Directory
from nbdzram.engine.domain cimport domain_of
from nbdzram.engine.format cimport (
    ENTRY_FREE, EXPORTS_MAX, FIRST_UNITS, READ_ONLY_FLAG, SEGMENTS_AT, SEGMENTS_MAX, VERSION, Superblock,
    dictionary_length, dictionary_unit, dictionary_word, identity_of,
)
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE
from nbdzram.engine.store cimport FORWARDS_MAX, ObjectStore
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, TOP_LEVEL, Tables, entry_handle, is_hole, page_of, repeated_of,
)

from nbdzram.errors import ArenaError

cdef bytes MAGIC = b"NBDZRAM\n"

HOLE, WORD, OBJECT, MISSING = range(4)


@cython.final
cdef class Salvage:
    """See salvage.pyi."""

    cdef Arena arena
    cdef ObjectStore store
    cdef Tables tables
    cdef Directory directory
    cdef uint64_t seed

    def __cinit__(self, str path):
        cdef Superblock* superblock
        self.arena = Arena(path, 0, read_only=True)
        if self.arena.unit_high < FIRST_UNITS:
            raise ArenaError(f"{path} is no arena, or hardly anything of it is left: there is nothing to read in it")
        superblock = <Superblock*>self.arena.base
        if memcmp(superblock.magic, <const char*>MAGIC, 8) != 0 or superblock.version != VERSION or (
                superblock.identity != identity_of(superblock)):
            raise ArenaError(
                f"the superblock of {path} is not what was written, and without it no block can be told from another: "
                "nothing of it can be read"
            )
        self.seed = superblock.seed
        self.store = ObjectStore(self.arena, SEGMENTS_AT)
        self.store.seed = self.seed
        self.store.fingerprint_mask = <uint64_t>-1
        self.store.cells.high = <uint32_t>-1  # every handle is looked at before its cell is (_has_cell)
        self.tables = Tables(self.store, self.seed)
        self.directory = Directory(self.arena, self.seed)
        self._open_dictionaries(superblock)

    cdef void _open_dictionaries(self, Superblock* superblock):
        """Those that are what was written."""
        cdef int number
        cdef uint64_t at
        cdef uint32_t length
        for number in range(CODEC_DICTS):
            at = <uint64_t>dictionary_unit(superblock, number) * UNIT_SIZE
            length = dictionary_length(superblock, number)
            if superblock.dictionary[number] and superblock.dictionary[number] == dictionary_word(
                    self.seed, number, dictionary_unit(superblock, number), length, superblock.digest[number]) and (
                    at + length <= self.arena.mapped) and (
                    digest(self.arena.base + at, length, self.seed) == superblock.digest[number]):
                self.store.ddicts[number] = zstd_new_ddict(self.arena.base + at, length)

    def exports(self):
        cdef uint32_t number
        found, lost = [], 0
        for number in range(EXPORTS_MAX):
            if not self.directory.is_held(number):
                continue
            if not self.directory.is_right(number):
                lost += 1
            elif self.directory.state(number) != ENTRY_FREE and self.directory.is_kept(number):
                head = self.directory.head(number)
                name = self._name_of(number)
                if name is None:
                    lost += 1
                else:
                    found.append((number, name, head.size, bool(head.flags & READ_ONLY_FLAG), domain_of(head.flags)))
        return found, lost

    cdef str _name_of(self, uint32_t number):
        """None: it is no text, though the entry's check agrees with it."""
        try:
            return self.directory.name_of(number)
        except UnicodeDecodeError:
            return None

    def leaves(self, uint32_t number):
        """Generates (first block, blocks), each an entry for block: (kind, word or handle); a leaf that is lost is
        None."""
        cdef uint64_t end = (self.directory.head(number).size + BLOCK - 1) // BLOCK
        yield from self._below(self.directory.entry(number).root, TOP_LEVEL + 1, number, end)

    def _below(self, uint64_t word, int level, uint64_t number, uint64_t end):
        cdef uint64_t first = number << BRANCH_SHIFT if level <= TOP_LEVEL else 0
        cdef uint64_t at = number << (level * BRANCH_SHIFT) if level <= TOP_LEVEL else 0
        cdef uint64_t* words
        cdef int index
        if at >= end:
            return
        if not self.tables.is_word(word, level, number) or (
                (<uint64_t>page_of(word) + 1) * PAGE_SIZE > self.arena.mapped):
            yield at, min(end, at + (<uint64_t>1 << (level * BRANCH_SHIFT))) - at, None
            return
        if page_of(word) == 0:
            return
        words = self.tables.words(page_of(word))
        if level == 1:
            yield at, min(end - at, <uint64_t>LEAF_BLOCKS), [
                self._entry(words[index], first + index) for index in range(min(end - at, <uint64_t>LEAF_BLOCKS))]
            return
        for index in range(BRANCH_CHILDREN):
            yield from self._below(words[index], level - 1, first + index, end)

    cdef object _entry(self, uint64_t entry, uint64_t block):
        cdef uint32_t handle
        handle = entry_handle(entry)
        if handle and not self._has_cell(handle) or not self.tables.is_right(entry, block):
            return MISSING, 0
        if handle:
            return OBJECT, handle
        return (HOLE, 0) if is_hole(entry) else (WORD, repeated_of(entry))

    def content(self, uint32_t handle):
        cdef uint8_t block[BLOCK]
        cdef uint64_t word = 0, offset
        cdef uint32_t first = handle
        cdef int steps = 0
        while self._has_cell(handle):
            word = self.store.cells.cell(handle).word
            if kind_of(word) != KIND_FORWARD:
                break
            handle = target_of(word)
            steps += 1
            if steps > FORWARDS_MAX:
                return None
        if not self._has_cell(handle):
            return None
        if not self.store.is_sound(first, handle):
            return None
        if kind_of(word) == KIND_FILL:
            return int(self.store.cells.cell(handle).fingerprint).to_bytes(8, "little") * (BLOCK // 8)
        if not self.store.decode_right(
                kind_of(word), self.store.bytes_at(word), length_of(word),
                self.store.cells.cell(handle).fingerprint, block):
            return None
        return block[:BLOCK]

    cdef bint _has_cell(self, uint32_t handle) noexcept nogil:
        """Whether the handle's cell lies in the file."""
        cdef uint32_t segment = handle // SEGMENT_CELLS
        cdef uint64_t unit
        if handle == 0 or segment >= SEGMENTS_MAX:
            return False
        unit = self.store.cells.learn_segment(segment)
        return FIRST_UNITS <= unit and unit + SEGMENT_UNITS <= self.arena.unit_high
