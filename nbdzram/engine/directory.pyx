"""The export directory: what of an export outlives the process beside its blocks.

    name   head   head   current   root                                512 bytes
            │      │        │
            └──────┴────────┘ which of the heads counts, and the serial number that it has

    head    state   flags   size   shrinking_from   generation   serial   check

    FREE ── write ──> FREE ── LIVE ── DELETING ── FREE
                       │       │└── size, shrinking_from, root
                       │     STATE (reveal)
                       └── conceal ── DELETING, and what it is beside that

To change a field is to fill the other head, check and all, and then to store `current`: one word, which makes true all
of it or nothing. So whoever changes an export's entry looks first whether it is right (Blocks.sound_root), and a new
export passes over a free entry that is not. A copy is of what the process knows of the export, and has an entry that is
right: a flush, a checkpoint and a clone go on beside a bit that flipped, and are the way out. A head's check covers the
name too while there is an export, so that an entry that was damaged is not another one. The root is a place in a block
table like any other: table.pyx publishes and checks it.

An entry is written while it is free, and nobody reads it then. Of one that is used for the first time `current` is 0
until its first head is whole; an export's head is of a later serial.

An export that becomes visible with others at once, or not at all, is concealed until then: its entry says DELETING, so
that opening ends it, as it ends any deletion that was cut off. Once it is whole it says so too, and opening keeps it
for whoever remembers that it was to be revealed.

Shrinking takes three changes, as clearing takes long:

    shrinking_from = the old size      nothing has changed yet
    size = the new one                 true from here on: what lies behind is out of reach
    shrinking_from = 0                 all of it is cleared

Who finds shrinking_from above the size goes on clearing: on opening, and before the export may grow.

An export gets another name where the one that counts is not, in the same room:

    name_place = where the name is     from here on the head checks the name alone, and not the rest of its room
    the bytes of the new name          beside the old one, at the room's beginning or its end; nobody reads them
    name_place, name_length            true from here on

So both names together must fit the room. Longer ones go by way of a short one, each step whole in itself.

Not locked here: the pool's lock covers every call.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from nbdzram.engine.arena cimport Arena
from nbdzram.engine.codec cimport digest
from nbdzram.engine.format cimport (
    CONCEALED_WHOLE, ENTRY_DELETING, ENTRY_FREE, ENTRY_LIVE, EXPORTS_AT, EXPORTS_MAX, HEADS, KEY_CURRENT, KEY_IDENTITY,
    NAME_MAX, NAME_ROOM, UNCONCEALED, checked_word, is_checked, mix,
)
from nbdzram.engine.must cimport must
from nbdzram.engine.page cimport PAGE_SIZE
from nbdzram.engine.publish cimport publish64
from nbdzram.engine.table cimport TOP_LEVEL, branch_word

cdef enum:
    ENTRIES_A_PAGE = 8
    CHECKED_SIZE = sizeof(Head) - 8  # of a head, what stands before its check

assert sizeof(ExportEntry) == PAGE_SIZE // ENTRIES_A_PAGE


@cython.final
cdef class Directory:
    """The directory of one arena, whose checks hang on `seed`."""

    def __cinit__(self, Arena arena, uint64_t seed):
        self.arena = arena
        self.seed = seed

    cdef ExportEntry* entry(self, uint32_t number) noexcept nogil:
        return <ExportEntry*>(self.arena.base + EXPORTS_AT) + number

    cdef Head* head(self, uint32_t number) noexcept nogil:
        """The head that counts."""
        cdef ExportEntry* entry = self.entry(number)
        return &entry.heads[(entry.current >> 16) & 1]

    cdef uint32_t state(self, uint32_t number) noexcept nogil:
        """What an entry is; one that was never used is free."""
        return self.head(number).state if self.entry(number).current else <uint32_t>ENTRY_FREE

    cdef bint is_held(self, uint32_t number) noexcept nogil:
        """Whether an entry may be read in an arena opened again."""
        return self.arena.holds(<uint64_t>(<char*>self.entry(number) - <char*>self.arena.base))

    cdef uint32_t next_held(self, uint32_t number) noexcept nogil:
        """The first such entry, from `number` on; EXPORTS_MAX: there is none. One system call for a page of them and
        all that lies in a hole before it."""
        cdef uint64_t found
        if number % ENTRIES_A_PAGE or number == EXPORTS_MAX:
            return number  # as those before it on its page
        found = self.arena.held_from(EXPORTS_AT + <uint64_t>number * sizeof(ExportEntry))
        found = (found - EXPORTS_AT) // sizeof(ExportEntry)
        return <uint32_t>found if found < EXPORTS_MAX else <uint32_t>EXPORTS_MAX

    cdef bint is_right(self, uint32_t number) noexcept nogil:
        """Whether an entry is what was written."""
        cdef ExportEntry* entry = self.entry(number)
        cdef Head* head = self.head(number)
        cdef int which
        if entry.current == 0:
            # Never used, or a process was killed as it first wrote it. That of an export was cleared, and is not right.
            for which in range(HEADS):
                if entry.heads[which].state != ENTRY_FREE or entry.heads[which].serial > 1:
                    return False
            return True
        return (is_checked(self.seed, KEY_CURRENT, number, entry.current) and head.serial == entry.current >> 17
                and self._has_name(head) and head.check == self._check(number, head))

    cdef bint make_room(self, uint32_t number) noexcept nogil:
        """Make sure that an entry can be written, after those before it. False when the file system is full."""
        return number % ENTRIES_A_PAGE != 0 or self.arena.commit(
            EXPORTS_AT + number // ENTRIES_A_PAGE * PAGE_SIZE, PAGE_SIZE)

    cdef void write(
        self, uint32_t number, const char* name, uint32_t name_length, uint64_t size, uint32_t flags
    ) noexcept nogil:
        """Make a free entry ready to be published: an export without blocks, of the next generation."""
        cdef ExportEntry* entry = self.entry(number)
        cdef Head* head = self._next(number)
        must(head.state == ENTRY_FREE, b"only a free entry of the export directory is written")
        must(name_length <= NAME_MAX, b"an export's name fits its entry")
        memset(entry.name, 0, NAME_ROOM)
        memcpy(entry.name, name, name_length)
        entry.root = branch_word(self.seed, TOP_LEVEL + 1, number, 0)
        head.state = ENTRY_FREE
        head.flags = flags
        head.size = size
        head.shrinking_from = 0
        head.concealed = UNCONCEALED
        head.identity = 0
        head.generation += 1
        head.name_length = name_length
        head.name_place = 0
        self._turn(number, head)

    cdef void share(self, uint32_t number, uint64_t size, uint64_t shrinking_from) noexcept nogil:
        """Give an entry that is written and still free the size of an export; its root is for Tables.share."""
        cdef Head* head = self._next(number)
        must(head.state == ENTRY_FREE, b"a clone is none yet when it is given its size")
        head.size = size
        head.shrinking_from = shrinking_from
        self._turn(number, head)

    cdef void write_head(
        self, uint32_t number, uint32_t state, uint32_t flags, uint64_t size, uint32_t name_length
    ) noexcept nogil:
        """Make the first head of an entry that has its name, and none that counts (upgrade.pyx)."""
        cdef Head* head = &self.entry(number).heads[0]
        memset(head, 0, sizeof(Head))
        head.state, head.flags, head.size, head.name_length, head.serial = state, flags, size, name_length, 1
        self._turn(number, head)

    cdef void publish(self, uint32_t number, Field field, uint64_t value) noexcept nogil:
        """Give one field of an entry its new value; true with one store."""
        cdef Head* head = self._next(number)
        if field == STATE:
            head.state = <uint32_t>value
            head.concealed = UNCONCEALED
        elif field == SIZE:
            head.size = value
        elif field == SHRINKING_FROM:
            head.shrinking_from = value
        elif field == CONCEALED:
            head.state = ENTRY_DELETING
            head.concealed = value
        else:
            head.identity = value
        self._turn(number, head)

    cdef bint rename(self, uint32_t number, const char* name, uint32_t name_length) noexcept nogil:
        """Give an export another name. False where there is no room for it beside the one that it has."""
        cdef Head* head = self.head(number)
        cdef uint32_t place = self._room_beside(head, name_length)
        must(head.state == ENTRY_LIVE, b"only a live export is renamed")
        if place == 0:
            return False
        if head.name_place == 0:
            head = self._next(number)
            head.name_place = 1
            self._turn(number, head)
        memcpy(self.entry(number).name + place - 1, name, name_length)
        head = self._next(number)
        head.name_place = place
        head.name_length = name_length
        self._turn(number, head)
        return True

    cdef bint is_kept(self, uint32_t number) noexcept nogil:
        """Whether opening keeps an entry that is held: an export, or one that is whole and only not revealed yet."""
        return self.state(number) == ENTRY_LIVE or (
            self.state(number) == ENTRY_DELETING and self.head(number).concealed == CONCEALED_WHOLE)

    cdef uint64_t identity(self, uint32_t number) noexcept nogil:
        """48 bits that all copies of this content have, and no other; 0: none.

        Bound to the entry's generation: a program that knows nothing of identities copies the word into its next one.
        """
        cdef uint64_t word = self.head(number).identity
        return word >> 16 if word and is_checked(self.seed, KEY_IDENTITY, self._life(number), word) else 0

    cdef void identify(self, uint32_t number, uint64_t identity) noexcept nogil:
        """Say which content this is; 0: it changes again."""
        self.publish(number, IDENTITY,
                     checked_word(self.seed, KEY_IDENTITY, self._life(number), identity) if identity else 0)

    cdef uint64_t _life(self, uint32_t number) noexcept nogil:
        return <uint64_t>self.head(number).generation << 32 | number

    cdef void finish_deletion(self, uint32_t number) noexcept nogil:
        """Nothing hangs on the entry any more."""
        publish64(&self.entry(number).root, branch_word(self.seed, TOP_LEVEL + 1, number, 0))
        self.publish(number, STATE, ENTRY_FREE)

    cdef str name_of(self, uint32_t number):
        cdef Head* head = self.head(number)
        cdef const char* name = self.entry(number).name + (head.name_place - 1 if head.name_place else 0)
        return name[:head.name_length].decode()

    cdef bint _has_name(self, const Head* head) noexcept nogil:
        """Whether what a head says of its name lies in the room of names."""
        if head.name_place == 0:
            return head.name_length <= NAME_MAX
        return head.name_length <= NAME_MAX and head.name_place - 1 <= NAME_ROOM - head.name_length

    cdef uint32_t _room_beside(self, const Head* head, uint32_t length) noexcept nogil:
        """The place for a name of so many bytes that leaves the one of `head` whole; 0: there is none."""
        cdef uint32_t first = head.name_place - 1 if head.name_place else 0
        if length <= first:
            return 1
        return NAME_ROOM - length + 1 if length <= NAME_ROOM - first - head.name_length else 0

    cdef Head* _next(self, uint32_t number) noexcept nogil:
        """The other head, as the one that counts but for its serial: to be changed and turned to."""
        cdef ExportEntry* entry = self.entry(number)
        cdef Head* now = self.head(number)
        cdef Head* other = &entry.heads[1 - ((entry.current >> 16) & 1)]
        memcpy(other, now, sizeof(Head))
        other.serial = now.serial + 1
        return other

    cdef void _turn(self, uint32_t number, Head* head) noexcept nogil:
        cdef ExportEntry* entry = self.entry(number)
        head.check = self._check(number, head)
        publish64(&entry.current, checked_word(
            self.seed, KEY_CURRENT, number, head.serial << 1 | (head == &entry.heads[1])))

    cdef uint64_t _check(self, uint32_t number, const Head* head) noexcept nogil:
        """What a head's check is to be."""
        cdef uint64_t found = digest(<const unsigned char*>head, CHECKED_SIZE, self.seed ^ number)
        cdef const unsigned char* name = <const unsigned char*>self.entry(number).name
        if head.state == ENTRY_FREE:
            return found
        if head.name_place:
            return mix(found, digest(name + head.name_place - 1, head.name_length, self.seed))
        return mix(found, digest(name, NAME_ROOM, self.seed))
