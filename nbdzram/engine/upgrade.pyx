"""Format 1 becomes format 2: once, when such an arena is opened.

    survey    as any other opening, by the rules of format 1: nothing is written, what is not sound is refused
    upgrade   new block tables beside the old ones, checks beside what had none, then one store of the version

Until that store the arena is one of format 1, as everything new lies where format 1 has nothing: nodes in units behind
the old end, heads behind a name's room, checks in bits that were 0, cells that no old entry leads to. So a process
killed anywhere in between leaves an arena that opens, by the old program as well. Behind it the old nodes are units of
nobody, which the opening frees.

    format 1     root 39 bits ─> 29 ─> 19 ─> leaf 9            1,024 numbers of 4 bytes in a branch
    format 2     root 45 bits ─> 36 ─> 27 ─> 18 ─> leaf 9      512 words of 8 bytes in a branch

The figures are how many bits of a block's number lie below a node: an old one covers 9, 4, 2 or 1 new ones, each of
which follows from it alone. So what clones shared they share again.

What format 1 did not check cannot be checked now: its entries are believed, but for what is impossible, and for handles
with more holders than they count. Its ages were told
by a clock that began with the machine; all blocks count as used now.

Known limits: there must be room for the block tables twice, 2 MiB for each GiB that is stored.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from nbdzram.engine.arena cimport region_ensure, region_free, region_reserve
from nbdzram.engine.cells cimport KIND_FILL, REFS_MAX, REFS_SHIFT, Cell, fill_word, kind_of, refs_bits
from nbdzram.engine.codec cimport CODEC_DICTS, CODEC_ZSTD_DICT, digest
from nbdzram.engine.directory cimport ExportEntry
from nbdzram.engine.format cimport (
    ENTRY_FREE, ENTRY_LIVE, EXPORTS_MAX, KEY_STRENGTH, NAME_MAX, VERSION, Superblock, checked_word, dictionary_word,
    identity_of,
)
from nbdzram.engine.opening cimport DICTIONARY, Opening
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_PAGES, UNIT_SIZE, units_of
from nbdzram.engine.publish cimport publish32, publish64
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, TOP_LEVEL, aged, branch_word, entry_handle, entry_word, hole_word,
    same_entry,
)

from nbdzram.errors import ArenaError

cdef enum:
    OLD_CHILDREN = 1024
    OLD_SHIFT = 10
    OLD_TOP = 3
    PARTS = 16         # of an old node, room for those that it covers: a root has one of level 4 and 8 of level 3
    NOTHING = 1 << 31  # of a part: it holds holes alone, and becomes no node


@cython.final
cdef class OldOpening(Opening):
    """The opening of an arena of format 1."""

    def __cinit__(self, *_):
        cdef uint64_t pages = <uint64_t>self.arena.unit_high * UNIT_PAGES
        if not (region_reserve(&self.places, pages * 8 + 8, NULL) and region_ensure(&self.places, pages * 8 + 8)
                and region_reserve(&self.made, pages * PARTS * 4 + 8, NULL)
                and region_ensure(&self.made, pages * PARTS * 4 + 8)
                and region_reserve(&self.plan, pages * PARTS * sizeof(Planned) + 8, NULL)):
            raise ArenaError("cannot reserve addresses to open an arena; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.places)
        region_free(&self.made)
        region_free(&self.plan)

    cdef uint32_t* branch(self, uint32_t page) noexcept nogil:
        return <uint32_t*>self.tables.words(page)

    # -- the survey ----------------------------------------------------------------------------------------------

    cdef bint _is_kept(self, uint32_t number) noexcept nogil:
        return self.directory.is_held(number) and self.directory.entry(number).old_state == ENTRY_LIVE

    cdef str _name_of(self, uint32_t number):
        cdef ExportEntry* entry = self.directory.entry(number)
        try:
            return entry.name[:entry.old_name_length].decode()
        except UnicodeDecodeError:
            self._refuse(f"the name of export number {number} is no text")

    cdef bint _find_dictionaries(self) noexcept nogil:
        cdef int number
        for number in range(CODEC_DICTS):
            if self.superblock.old_unit[number] and not self._claim(
                    self.superblock.old_unit[number], units_of(self.superblock.old_length[number]), DICTIONARY):
                return False
        return True

    cdef bint _has_dictionaries(self) noexcept nogil:
        """All that objects need; and that nothing has more holders than it counts, as then some entry is not its
        own."""
        cdef uint32_t handle, holders
        cdef uint64_t counted
        cdef int number
        for handle in range(1, self.store.cells.high):
            holders = (<uint32_t*>self.holders.base)[handle]
            counted = self.store.cells.cell(handle).word >> REFS_SHIFT
            if holders > counted and counted < REFS_MAX:  # fewer is what a kill leaves
                snprintf(self.complaint, self._room(), "handle %u has %u holders and counts %u",
                         handle, holders, <uint32_t>counted)
                return False
        for number in range(CODEC_DICTS):
            if self.used[CODEC_ZSTD_DICT + number] and self.superblock.old_unit[number] == 0:
                snprintf(self.complaint, self._room(), "dictionary %d is not there", number)
                return False
        return True

    cdef bint _find_exports(self) noexcept nogil:
        cdef uint32_t number
        cdef ExportEntry* entry
        for number in range(EXPORTS_MAX):
            if not self.directory.is_held(number):
                continue
            entry = self.directory.entry(number)
            if entry.old_state > 2 or entry.old_name_length > NAME_MAX or self._is_too_large(entry.old_size):
                snprintf(self.complaint, self._room(), "entry %u of the export directory cannot be one", number)
                return False
            if entry.old_state == ENTRY_LIVE:
                self.exports_high = number + 1
                if not self._walk_old(number, entry.old_root, OLD_TOP, 0):
                    return False
        return True

    cdef bint _walk_old(self, uint32_t export, uint32_t page, int level, uint64_t number) noexcept nogil:
        """Find an old node and what is below it."""
        cdef uint64_t* entries = self.tables.words(page)
        cdef bint fresh = False
        cdef int index
        if page == 0:
            return True
        if not self._find_node(page, level, &fresh) or not self._find_place(page, level, number):
            return False
        for index in range(OLD_CHILDREN if level and fresh else 0):
            if not self._walk_old(export, self.branch(page)[index], level - 1, number << OLD_SHIFT | index):
                return False
        for index in range(LEAF_BLOCKS if level == 0 and fresh else 0):
            if entry_handle(entries[index]) and not self._lead(export, number * LEAF_BLOCKS + index, entries[index]):
                return False
        return True

    cdef bint _lead(self, uint32_t export, uint64_t block, uint64_t entry) noexcept nogil:
        """Follow the entry of a block to its object."""
        cdef uint32_t handle = entry_handle(entry)
        if handle >= self.store.cells.high or self.store.cells.cell(handle).word == 0:
            snprintf(self.complaint, self._room(), "block %llu of export number %u leads to handle %u, which is free",
                     <unsigned long long>block, export, handle)
            return False
        return self._hold(handle)

    cdef bint _find_place(self, uint32_t page, int level, uint64_t number) noexcept nogil:
        """A node stands at one place of its tree, in each that has it."""
        cdef uint64_t* place = <uint64_t*>self.places.base + page
        cdef uint64_t here = number + 1
        if place[0] and place[0] != here:
            snprintf(self.complaint, self._room(), "table node %u stands at two places", page)
            return False
        place[0] = here
        return True

    # -- the upgrade ---------------------------------------------------------------------------------------------

    def upgrade(self, uint32_t now) -> None:
        """Make it an arena of format 2; no reader of this opening's rooms is right afterwards. Raises ArenaError."""
        cdef uint64_t size = self.arena.mapped
        cdef uint32_t unit = 0
        cdef bint roomy
        with nogil:
            roomy = self._plan_exports() and self.arena.admit_writes()
            if roomy and self.planned:
                unit = self.arena.take_run(units_of(<uint64_t>self.planned * PAGE_SIZE))
                roomy = unit != 0 and self.arena.commit(<uint64_t>unit * UNIT_SIZE, <uint64_t>self.planned * PAGE_SIZE)
            if not roomy:
                self.arena.cut(size)
            else:
                self.first = unit * UNIT_PAGES
                self._write_nodes(now)
        if not roomy or self.out_of_memory:
            raise ArenaError(
                f"no room to bring {self.arena.path} from format 1 to format {VERSION}: its block tables need "
                f"{self.planned * PAGE_SIZE >> 10} KiB more for a moment; free some of the file system, and start again"
            )
        with nogil:
            self._check_fills()
            self._write_exports()
            self._write_superblock()
            publish32(&self.superblock.version, VERSION)

    cdef bint _plan_exports(self) noexcept nogil:
        """Which nodes there will be. False without memory."""
        cdef uint32_t number
        for number in range(self.exports_high):
            if self._is_kept(number):
                self._plan_node(self.directory.entry(number).old_root, TOP_LEVEL, 0)
        return not self.out_of_memory

    cdef uint32_t _below(self, uint32_t old, int level, uint64_t number) noexcept nogil:
        """The old node from which follows the one of `level` - 1 and `number`, below one that follows from `old`."""
        if level == TOP_LEVEL:
            return old if number < 8 else 0
        # Two bits, one or none of its number say which part of an old node it is.
        return self.branch(old)[(number >> (level - 1)) & (OLD_CHILDREN - 1)]

    cdef uint32_t* _made(self, uint32_t old, int level, uint64_t number) noexcept nogil:
        """Which of the new nodes a part of an old node is."""
        cdef uint32_t part = 8 if level == TOP_LEVEL else <uint32_t>number & ((1 << level) - 1)
        return <uint32_t*>self.made.base + <uint64_t>old * PARTS + part

    cdef uint32_t _plan_node(self, uint32_t old, int level, uint64_t number) noexcept nogil:
        """Plan the node of a level and all below it; 0 when there is nothing in it."""
        cdef uint32_t* made = self._made(old, level, number)
        cdef uint32_t below = 0
        cdef uint64_t child
        cdef Planned* node
        if old == 0 or made[0]:
            return made[0] & ~<uint32_t>NOTHING if old else 0
        for child in range(number << BRANCH_SHIFT, (number + 1) << BRANCH_SHIFT):
            if level:
                below |= self._plan_node(self._below(old, level, child), level - 1, child)
        if level and below == 0:
            made[0] = NOTHING
            return 0
        if not region_ensure(&self.plan, (<uint64_t>self.planned + 1) * sizeof(Planned)):
            self.out_of_memory = True
            return 0
        node = <Planned*>self.plan.base + self.planned
        node.old, node.level, node.number = old, level, number
        self.planned += 1
        made[0] = self.planned
        return made[0]

    cdef uint32_t _page_of(self, uint32_t old, int level, uint64_t number) noexcept nogil:
        """The page of a node that was planned; 0 for none."""
        cdef uint32_t made = self._made(old, level, number)[0] if old else 0
        return 0 if made == 0 or made & <uint32_t>NOTHING else self.first + made - 1

    cdef void _write_nodes(self, uint32_t now) noexcept nogil:
        cdef Planned* node
        cdef uint64_t* words
        cdef uint64_t child
        cdef uint32_t index, place
        for index in range(self.planned):
            node = <Planned*>self.plan.base + index
            words = self.tables.words(self.first + index)
            if node.level == 0:
                self._write_leaf(words, self.tables.words(node.old), node.number << BRANCH_SHIFT, now)
                continue
            for place in range(BRANCH_CHILDREN):
                child = node.number << BRANCH_SHIFT | place
                words[place] = branch_word(self.tables.seed, node.level, child, self._page_of(
                    self._below(node.old, node.level, child), node.level - 1, child))

    cdef void _write_leaf(self, uint64_t* words, const uint64_t* old, uint64_t first, uint32_t now) noexcept nogil:
        cdef uint64_t repeated
        cdef uint32_t handle
        cdef int index
        for index in range(LEAF_BLOCKS):
            handle = entry_handle(old[index])
            words[index] = hole_word(self.tables.seed, first + index)
            if old[index] & 1:
                repeated = <uint64_t>(<int64_t>old[index] >> 1)
                words[index] = same_entry(self.tables.seed, first + index, repeated)
                if words[index] == 0:  # its check takes the room of it: it gets a cell
                    handle = self.store.put_fill(repeated)
                    self.out_of_memory = self.out_of_memory or handle == 0
            if handle:
                words[index] = aged(entry_word(
                    self.tables.seed, first + index, handle, self.store.cells.cell(handle).fingerprint), now)

    cdef void _check_fills(self) noexcept nogil:
        cdef uint32_t handle
        cdef Cell* cell
        for handle in range(1, self.store.cells.high):
            cell = self.store.cells.cell(handle)
            if kind_of(cell.word) == KIND_FILL:
                publish64(&cell.word, refs_bits(cell.word) | fill_word(self.tables.seed, cell.fingerprint))

    cdef void _write_exports(self) noexcept nogil:
        """Heads for all entries that were ever used; deletions that were cut off are done with that."""
        cdef uint32_t number
        cdef ExportEntry* entry
        for number in range(EXPORTS_MAX):
            if not self.directory.is_held(number):
                continue
            entry = self.directory.entry(number)
            if entry.old_state == ENTRY_LIVE:
                self.directory.write_head(number, ENTRY_LIVE, entry.old_flags, entry.old_size, entry.old_name_length)
                entry.root = branch_word(
                    self.tables.seed, TOP_LEVEL + 1, number, self._page_of(entry.old_root, TOP_LEVEL, 0))
            else:
                self.directory.write_head(number, ENTRY_FREE, 0, 0, 0)

    cdef void _write_superblock(self) noexcept nogil:
        cdef Superblock whole
        cdef Superblock* block = self.superblock
        cdef uint32_t unit, length
        cdef int number
        for number in range(CODEC_DICTS):
            unit, length = block.old_unit[number], block.old_length[number]
            if unit:
                block.digest[number] = digest(self.arena.base + <uint64_t>unit * UNIT_SIZE, length, block.seed)
                block.dictionary[number] = dictionary_word(block.seed, number, unit, length, block.digest[number])
            else:
                block.dictionary[number] = 0
        block.strength = checked_word(block.seed, KEY_STRENGTH, 0, block.old_strength)
        block.features = 0
        whole = block[0]
        whole.version = VERSION
        block.identity = identity_of(&whole)
