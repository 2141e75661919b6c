"""Opening an arena again, in two passes: first whether it is sound, then what is derived from it.

    survey    reads alone     superblock ─> cell segments ─> dictionaries ─> exports ─> branches
                              ═> leaves, entries, holders      threads share them: a branch of level 1 is a part
                              ═> objects, slots                ... a segment of cells is one
    rebuild   writes          deletions that were cut off
                              ═> counts of holders, free handles, slots (adoption.pyx)
                              ─> free nodes and units
                              ═> blocks of exports that share nodes

Until the survey is done the file is mapped for reading (arena.pyx): a refused arena stays as it is, byte for byte. What
the survey finds out it keeps beside the arena, where the rebuild takes it from; so nothing is walked twice.

Refused is what nobody could serve rightly: a superblock, a directory entry, a branch of a block table or a dictionary
that is not what was written; an object or a forward that leads where none can be; two owners of one page. An entry of a
leaf that is not right is its block's matter: that block cannot be read, everything else can (`wrong` counts them).

Invariants
1. Every unit has one owner; of a zspage also every slot has one, of a node's unit every page.
2. A node has one level. So walks end; forwards end, as each leads to a cell of the same fingerprint, FORWARDS_MAX at
   most.
3. Threads of the survey read what nobody writes, and change what they share by one atomic step each: whose a unit is,
   who looks below a node, how many hold a handle, whether a slot is an object's. Each step comes out the same in sum,
   or is refused to the second that comes, in whichever order they come. So whether an arena is sound, and what is found
   in it, does not hang on how many threads looked; but which of several faults is met first does, and so the words of a
   refusal are those of a survey that one thread makes (Pool).
4. No thread of the survey takes memory, or a lock.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset

import functools

from nbdzram.engine.adoption cimport Share, add_share, adopt_share, is_object
from nbdzram.engine.arena cimport region_ensure, region_expect, region_free, region_reserve
from nbdzram.engine.cells cimport (
    CELLS_A_PAGE, KIND_FILL, KIND_FORWARD, REFS_MAX, SEGMENT_CELLS, SEGMENT_UNITS, kind_of, length_of, slot_of,
    target_of, unit_of,
)
from nbdzram.engine.codec cimport BLOCK, CODEC_DICTS, CODEC_ZSTD, CODEC_ZSTD_DICT, digest, zstd_new_ddict
from nbdzram.engine.directory cimport Directory
from nbdzram.engine.format cimport (
    ENTRY_DELETING, ENTRY_FREE, EXPORTS_MAX, FIRST_UNITS, KEY_STRENGTH, SEGMENTS_MAX, Superblock, dictionary_length,
    dictionary_unit, dictionary_word, is_checked,
)
from nbdzram.engine.must cimport must
from nbdzram.engine.page cimport UNIT_PAGES, UNIT_SIZE, units_of
from nbdzram.engine.publish cimport (
    add32, add64, amend32, exchange8, exchange32, look8, look32, publish64, step_aside,
)
from nbdzram.engine.store cimport FORWARDS_MAX, ObjectStore
from nbdzram.engine.table cimport (
    BRANCH_CHILDREN, BRANCH_SHIFT, LEAF_BLOCKS, LEVEL_SHIFT, MAX_BLOCKS_SHIFT, TOP_LEVEL, Tables, entry_handle, is_hole,
    page_of,
)

from nbdzram.errors import ArenaError

ctypedef unsigned long long ull  # for printf


def run_in_turn(functions) -> None:
    """One after the other, by the thread that asks."""
    for function in functions:
        function()


cdef class Opening:
    """One opening of an arena into a store and tables that are empty yet. `together` runs functions, several at the
    same time, and returns when all have."""

    def __cinit__(self, ObjectStore store, Tables tables, Directory directory, together=run_in_turn):
        self.arena = store.arena
        self.store = store
        self.tables = tables
        self.directory = directory
        self.together = together
        self.superblock = <Superblock*>self.arena.base
        if (not region_reserve(&self.owners, self.arena.unit_high + 1, NULL)
                or not region_ensure(&self.owners, self.arena.unit_high + 1)
                or not region_reserve(&self.counts, EXPORTS_MAX * sizeof(BlockCount), NULL)
                or not region_ensure(&self.counts, EXPORTS_MAX * sizeof(BlockCount))):
            raise ArenaError("cannot reserve addresses to open an arena; raise ulimit -v")

    def __dealloc__(self):
        region_free(&self.owners)
        region_free(&self.holders)
        region_free(&self.branches)
        region_free(&self.shares)
        region_free(&self.counts)

    def survey(self) -> bool:
        """Find everything, and find it sound. Writes nothing to the arena.

        Raises ArenaError with the first fault. False: there is one, but several threads looked; ask one.
        """
        cdef bint sound
        with nogil:
            sound = self._find_places()
        if sound and not (self._do(self._find_leaves, self.branch_count)
                          and self._do(self._find_objects, self.segments)):
            if self.together is not run_in_turn:
                return False
            sound = False
        if sound:
            with nogil:
                sound = self._has_counts() and self._has_dictionaries()
        if not sound:
            self._refuse(self.complaint.decode())
        self._require_names()
        return True

    def _do(self, part, uint32_t count) -> bool:
        """All parts of something, beside each other. Whether no fault was found."""
        self.together([functools.partial(part, number) for number in range(count)])
        return self.faults == 0

    def _require_names(self):
        names = set()
        for number in range(self.exports_high):
            if self._is_kept(number):
                name = self._name_of(number)
                if name in names:
                    self._refuse(f"two exports are named {name!r}")
                names.add(name)

    def _refuse(self, reason):
        raise ArenaError(f"the arena {self.arena.place} is damaged: {reason}; restore it, or {self.arena.instead}")

    def rebuild(self):
        """Make what is derived. The numbers of the exports, with how many blocks each stores and how many of one
        word."""
        cdef uint32_t number
        cdef BlockCount* count
        exports = []
        if not self.arena.admit_writes():
            raise ArenaError(f"the system refuses to write to the arena {self.arena.place}, now that it is read")
        for number in range(self.exports_high):
            if (self.directory.is_held(number) and self.directory.state(number) == ENTRY_DELETING
                    and not self._is_kept(number)):
                self.directory.finish_deletion(number)
        self._open_dictionaries()
        self._expect_objects()
        shares = [functools.partial(self._adopt_share, segment) for segment in range(self.segments)]
        self.together([self._adopt_slots, *shares])
        with nogil:
            self._add_shares()
            self._free_units()
        kept = [number for number in range(self.exports_high) if self._is_kept(number)]
        self.together([
            functools.partial(self._count_again, number) for number in kept
            if (<BlockCount*>self.counts.base)[<uint32_t>number].shares
        ])
        for number in kept:
            count = <BlockCount*>self.counts.base + number
            exports.append((number, count.stored, count.same))
        return exports

    def _count_again(self, uint32_t number):
        """Count the blocks of an export that has nodes which others have too: they were looked at for one of them."""
        cdef BlockCount* count = <BlockCount*>self.counts.base + number
        with nogil:
            count.stored = count.same = 0
            self.tables.count(self.directory.entry(number).root, TOP_LEVEL + 1, number, &count.stored, &count.same)

    cdef bint _is_kept(self, uint32_t number) noexcept nogil:
        """Whether an entry of the directory is an export, or is to be one."""
        return self.directory.is_held(number) and self.directory.is_kept(number)

    cdef str _name_of(self, uint32_t number):
        try:
            return self.directory.name_of(number)
        except UnicodeDecodeError:
            self._refuse(f"the name of export number {number} is no text")

    cdef bint _is_too_large(self, uint64_t size) noexcept nogil:
        return size > <uint64_t>BLOCK << MAX_BLOCKS_SHIFT

    # -- the survey ----------------------------------------------------------------------------------------------

    cdef bint _find_places(self) noexcept nogil:
        """What is few, and where the many are to be looked for."""
        return (self._claim(0, FIRST_UNITS, FIXED) and self._find_segments() and self._find_dictionaries()
                and self._find_exports())

    cdef size_t _room(self) noexcept nogil:
        """Room for a sentence, for who finds the first fault; the others have none."""
        return COMPLAINT if exchange32(&self.faults, 0, 1) else 0

    cdef bint _claim(self, uint32_t unit, uint32_t count, int owner) noexcept nogil:
        """Give units an owner. False, with a complaint, if one has another, or lies behind the end."""
        cdef uint32_t index
        if unit == 0 and owner != FIXED or <uint64_t>unit + count > self.arena.unit_high:
            snprintf(self.complaint, self._room(), "%u units from %u on are named, of %u that there are",
                     count, unit, self.arena.unit_high)
            return False
        for index in range(unit, unit + count):
            # Several nodes and several objects share a unit; all else has its own.
            if owner >= NODES and look8(self.owners.base + index) == owner:
                continue
            step_aside()
            if not exchange8(self.owners.base + index, NOBODYS, owner) and not (
                    owner >= NODES and look8(self.owners.base + index) == owner):
                snprintf(self.complaint, self._room(), "unit %u has two owners, of kinds %u and %d",
                         index, <uint32_t>look8(self.owners.base + index), owner)
                return False
        return True

    cdef bint _find_segments(self) noexcept nogil:
        """The segments of cells, without gaps; and how many handles there have been."""
        cdef uint32_t segment
        cdef bint held = False
        self.segments = self.store.cells.segments_held()
        for segment in range(self.segments):
            if not self._claim(self.store.cells.segments[segment], SEGMENT_UNITS, CELLS):
                return False
        for segment in range(self.segments, SEGMENTS_MAX):
            if segment == self.segments or segment % 1024 == 0:  # of a page's words
                held = self.arena.holds(self.store.cells.directory_at(segment))
            if held and self.store.cells.directory[segment]:
                snprintf(self.complaint, self._room(), "there is a cell segment %u, and none of number %u",
                         segment, self.segments)
                return False
        self._find_cells()
        if not (self.store.cells.ready() and self.store.index.reserve(self.store.cells.high)
                and self.tables.adoption_begin() and self.store.slab.adoption_begin()
                and region_reserve(&self.branches, self.arena.unit_high * <uint64_t>UNIT_PAGES * sizeof(Branch), NULL)
                and region_reserve(&self.holders, (<uint64_t>self.store.cells.high + 1) * 4, NULL)
                and region_ensure(&self.holders, (<uint64_t>self.store.cells.high + 1) * 4)
                and region_reserve(&self.shares, (self.segments + 1) * sizeof(Share), NULL)
                and region_ensure(&self.shares, (self.segments + 1) * sizeof(Share))):
            snprintf(self.complaint, self._room(), "no memory for its handles")
            return False
        self._cut_shares()
        region_expect(&self.holders, self.store.cells.high * <uint64_t>4)
        region_expect(&self.store.cells.links, self.store.cells.high * <uint64_t>4)
        return True

    cdef void _find_cells(self) noexcept nogil:
        """The highest cell that is in use."""
        cdef uint64_t handle = 1
        while handle < <uint64_t>self.segments * SEGMENT_CELLS and self.store.cells.held(<uint32_t>handle):
            handle = (handle // CELLS_A_PAGE + 1) * CELLS_A_PAGE  # pages of cells are taken in their order
        while handle > 1 and self.store.cells.cell(<uint32_t>(handle - 1)).word == 0:
            handle -= 1
        self.store.cells.high = <uint32_t>handle

    cdef void _cut_shares(self) noexcept nogil:
        """Let the cells be looked at, and counted, by several threads."""
        cdef uint32_t segment
        cdef Share* share
        for segment in range(self.segments):
            share = <Share*>self.shares.base + segment
            share.first = max(1, segment * SEGMENT_CELLS)
            share.end = <uint32_t>min(<uint64_t>self.store.cells.high, (segment + <uint64_t>1) * SEGMENT_CELLS)

    cdef bint _find_dictionaries(self) noexcept nogil:
        cdef int number
        for number in range(CODEC_DICTS):
            if self.superblock.dictionary[number] == 0:
                continue
            if self.superblock.dictionary[number] != dictionary_word(
                    self.superblock.seed, number, dictionary_unit(self.superblock, number),
                    dictionary_length(self.superblock, number), self.superblock.digest[number]):
                snprintf(self.complaint, self._room(), "the place of dictionary %d is not what was written", number)
                return False
            if not self._claim(dictionary_unit(self.superblock, number),
                               units_of(dictionary_length(self.superblock, number)), DICTIONARY):
                return False
        return True

    cdef bint _find_exports(self) noexcept nogil:
        """The export directory, and what its tables lead to."""
        cdef uint32_t number, following = 0
        while True:
            number = self.directory.next_held(following)
            if number >= EXPORTS_MAX:
                return True
            following = number + 1
            if not self.directory.is_right(number):
                snprintf(self.complaint, self._room(),
                         "entry %u of the export directory is not what was written", number)
                return False
            if self.directory.state(number) == ENTRY_FREE:
                continue
            if self._is_too_large(self.directory.head(number).size):
                snprintf(self.complaint, self._room(), "the size of export number %u cannot be one", number)
                return False
            self.exports_high = number + 1
            if self._is_kept(number) and not self._walk(
                    number, self.directory.entry(number).root, TOP_LEVEL + 1, number):
                return False

    cdef bint _walk(self, uint32_t export, uint64_t word, int level, uint64_t number) noexcept nogil:
        """Find the branch that word `number` of `level` names, and those below it."""
        cdef uint64_t first = number << BRANCH_SHIFT if level <= TOP_LEVEL else 0
        cdef uint64_t* words = self.tables.words(page_of(word))
        cdef bint fresh = False
        cdef int index
        if not self._follow(export, word, level, number, &fresh):
            return False
        if fresh and level == 2:
            return self._note_branch(export, page_of(word), first)
        for index in range(BRANCH_CHILDREN if fresh else 0):
            if not self._walk(export, words[index], level - 1, first + index):
                return False
        return True

    cdef bint _note_branch(self, uint32_t export, uint32_t page, uint64_t first) noexcept nogil:
        """A branch of level 1 is found, whose leaves are a part of the survey."""
        cdef Branch* branch = <Branch*>self.branches.base + self.branch_count
        if not region_ensure(&self.branches, (<uint64_t>self.branch_count + 1) * sizeof(Branch)):
            snprintf(self.complaint, self._room(), "no memory for its block tables")
            return False
        branch.export, branch.page, branch.first = export, page, first
        self.branch_count += 1
        return True

    def _find_leaves(self, uint32_t number):
        """A part of the survey: the leaves that a branch names, and what holders they are."""
        cdef Branch* branch = <Branch*>self.branches.base + number
        cdef uint64_t* words = self.tables.words(branch.page)
        cdef int index = 0
        with nogil:
            while index < BRANCH_CHILDREN and look32(&self.faults) == 0 and self._find_leaf(
                    branch.export, words[index], branch.first + index):
                index += 1
            must(index == BRANCH_CHILDREN or look32(&self.faults), b"what is not sound was complained of")

    cdef bint _find_leaf(self, uint32_t export, uint64_t word, uint64_t number) noexcept nogil:
        cdef uint64_t* entries = self.tables.words(page_of(word))
        cdef uint64_t first = number << BRANCH_SHIFT
        cdef uint64_t stored = 0, same = 0, wrong = 0
        cdef bint fresh = False
        cdef int index
        if not self._follow(export, word, 1, number, &fresh):
            return False
        for index in range(LEAF_BLOCKS if fresh else 0):
            if not self.tables.is_right(entries[index], first + index):
                wrong += 1
            elif not is_hole(entries[index]):
                stored += 1
                same += self.tables.is_same(entries[index])
                if entry_handle(entries[index]) and not self._hold(entry_handle(entries[index])):
                    return False
        self._add(export, stored, same, wrong)
        return True

    cdef void _add(self, uint32_t export, uint64_t stored, uint64_t same, uint64_t wrong) noexcept nogil:
        """Blocks of a leaf to those of its export."""
        cdef BlockCount* count = <BlockCount*>self.counts.base + export
        add64(&count.stored, stored)
        add64(&count.same, same)
        if wrong:
            add64(&self.wrong, wrong)

    cdef bint _follow(self, uint32_t export, uint64_t word, int level, uint64_t number, bint* fresh) noexcept nogil:
        """Find the node that word `number` of `level` names, or none. fresh: what is below has not been looked at."""
        cdef BlockCount* count = <BlockCount*>self.counts.base + export
        if not self.tables.is_word(word, level, number):
            snprintf(self.complaint, self._room(),
                     "the block table of export number %u is not what was written, from block %llu on",
                     export, <ull>(number << (level * BRANCH_SHIFT) if level <= TOP_LEVEL else 0))
            return False
        if page_of(word) == 0:
            return True
        if not self._find_node(page_of(word), level - 1, fresh):
            return False
        if not fresh[0]:
            amend32(&count.shares, True)
        return True

    cdef bint _find_node(self, uint32_t page, int level, bint* fresh) noexcept nogil:
        """Count a node, or one parent more of it."""
        if not self._claim(page // UNIT_PAGES, 1, NODES):
            return False
        if not self.tables.adopt(page, level, fresh):
            snprintf(self.complaint, self._room(), "table node %u stands at levels %d and %u",
                     page, level, look32(self.tables.node(page)) >> LEVEL_SHIFT)
            return False
        return True

    cdef bint _hold(self, uint32_t handle) noexcept nogil:
        """Count a holder of a handle, and of all that it leads to."""
        cdef uint64_t fingerprint = self.store.cells.cell(handle).fingerprint
        cdef uint64_t word = self.store.cells.cell(handle).word
        cdef uint32_t first = handle
        cdef int steps = 0
        while True:
            add32(<uint32_t*>self.holders.base + handle, 1)
            if kind_of(word) != KIND_FORWARD:
                break
            handle = target_of(word)
            steps += 1
            word = self.store.cells.cell(handle).word if 0 < handle < self.store.cells.high else 0
            if word == 0 or steps > FORWARDS_MAX or self.store.cells.cell(handle).fingerprint != fingerprint:
                snprintf(self.complaint, self._room(),
                         "handle %u leads on to handle %u, which is not of the same content", first, handle)
                return False
        if kind_of(word) != KIND_FILL and kind_of(word) >= CODEC_ZSTD_DICT + CODEC_DICTS:
            snprintf(self.complaint, self._room(), "handle %u leads to handle %u, of kind %u, which there is not",
                     first, handle, kind_of(word))
            return False
        return True

    def _find_objects(self, uint32_t segment):
        """A part of the survey: give each object of a segment, that something leads to, its slot."""
        cdef Share* share = <Share*>self.shares.base + segment
        cdef uint64_t used[16]
        cdef uint32_t handle
        cdef int kind
        with nogil:
            memset(used, 0, sizeof(used))
            handle = share.first
            while handle < share.end and look32(&self.faults) == 0 and self._find_object(handle, share, used):
                handle += 1
            must(handle >= share.end or look32(&self.faults), b"what is not sound was complained of")
            for kind in range(16):
                if used[kind]:
                    add64(&self.used[kind], used[kind])

    cdef bint _find_object(self, uint32_t handle, Share* share, uint64_t* used) noexcept nogil:
        cdef uint32_t holders = (<uint32_t*>self.holders.base)[handle]
        cdef uint64_t word = self.store.cells.cell(handle).word
        share.crowded |= holders > REFS_MAX
        if holders == 0 or not is_object(word):
            return True
        used[kind_of(word)] += 1
        if unit_of(word) != share.unit and not self._claim(unit_of(word), 1, ZSPAGE):
            return False
        share.unit = unit_of(word)
        if not self.store.slab.adopt(unit_of(word), slot_of(word), length_of(word)):
            snprintf(self.complaint, self._room(), "object %u lies where none can be", handle)
            return False
        return True

    cdef bint _has_counts(self) noexcept nogil:
        """Room for the holders of each handle that has more than its cell counts. False without memory."""
        cdef uint32_t segment, handle
        cdef Share* share
        for segment in range(self.segments):
            share = <Share*>self.shares.base + segment
            for handle in range(share.first, share.end if share.crowded else share.first):
                if (<uint32_t*>self.holders.base)[handle] > REFS_MAX and not self.store.cells.take_chunk(handle):
                    snprintf(self.complaint, self._room(), "no memory for its handles")
                    return False
        return True

    cdef bint _has_dictionaries(self) noexcept nogil:
        """Those that objects need are there, and are what was written."""
        cdef int number
        for number in range(CODEC_DICTS):
            if self.used[CODEC_ZSTD_DICT + number] and (
                    self.superblock.dictionary[number] == 0
                    or digest(self.arena.base + <uint64_t>dictionary_unit(self.superblock, number) * UNIT_SIZE,
                              dictionary_length(self.superblock, number), self.superblock.seed)
                    != self.superblock.digest[number]):
                snprintf(self.complaint, self._room(), "dictionary %d is not what was written", number)
                return False
        return True

    # -- the rebuild ---------------------------------------------------------------------------------------------

    def _open_dictionaries(self):
        """Those that objects need; the others' units are free."""
        cdef int number
        cdef uint32_t unit, index
        if is_checked(self.superblock.seed, KEY_STRENGTH, 0, self.superblock.strength):
            self.store.tried_strength = <int>(self.superblock.strength >> 16)
        for number in range(CODEC_DICTS):
            if self.superblock.dictionary[number] == 0:
                continue
            unit = dictionary_unit(self.superblock, number)
            if self.used[CODEC_ZSTD_DICT + number] == 0:
                for index in range(unit, unit + units_of(dictionary_length(self.superblock, number))):
                    self.owners.base[index] = NOBODYS
                publish64(&self.superblock.dictionary[number], 0)
                continue
            self.store.ddicts[number] = zstd_new_ddict(
                self.arena.base + <uint64_t>unit * UNIT_SIZE, dictionary_length(self.superblock, number))
            if self.store.ddicts[number] == NULL:
                raise ArenaError(
                    f"no memory for a dictionary of the arena {self.arena.place}; free some and start again")

    cdef void _expect_objects(self) noexcept nogil:
        cdef uint64_t objects = 0
        cdef int kind
        for kind in range(CODEC_ZSTD_DICT + CODEC_DICTS):
            objects += self.used[kind]
            if kind >= CODEC_ZSTD and self.used[kind]:
                self.store.expect_tried()
        self.store.index.expect(objects)

    def _adopt_share(self, uint32_t segment):
        with nogil:
            adopt_share(self.store, <uint32_t*>self.holders.base, <Share*>self.shares.base + segment)

    def _adopt_slots(self):
        with nogil:
            self.store.slab.adoption_done()

    cdef void _add_shares(self) noexcept nogil:
        cdef uint32_t segment
        for segment in range(self.segments):
            add_share(self.store, <Share*>self.shares.base + segment)
        self.store.index.fit(<uint32_t>-1)

    cdef void _free_units(self) noexcept nogil:
        """The units of nobody, and the pages of the others that nothing lies in."""
        cdef uint32_t unit = FIRST_UNITS, end, free
        while unit < self.arena.unit_high:
            if self.owners.base[unit] == NODES:
                self.tables.adopt_unit(unit)
            end = unit
            while end < self.arena.unit_high and self.owners.base[end] == NOBODYS:
                end += 1
            # All that lie together at once: on a disk each call may wait for the file system's journal.
            self.arena.release(<uint64_t>unit * UNIT_SIZE, <uint64_t>(end - unit) * UNIT_SIZE)
            for free in range(unit, end):
                self.arena.give(free)
            unit = end if end > unit else unit + 1
