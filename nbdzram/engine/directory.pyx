"""The export directory: what of an export outlives the process beside its blocks.

    state   flags   size   root   name_length, name   shrinking_from   generation         512 bytes

    FREE ── entry_write: all but the state ──> FREE ── LIVE ── DELETING ── FREE
                                                        └── size, shrinking_from, root

An entry is written while it is free, and nobody reads it then; after that each change is one store of one word, and
the entry is valid before it and behind it (entry_publish is the only door, but for the root: that is a place in a block
table like any other, and table.pyx publishes it).

Shrinking takes three stores, as clearing takes long:

    shrinking_from = the old size      nothing has changed yet
    size = the new one                 true from here on: what lies behind is out of reach
    shrinking_from = 0                 all of it is cleared

Who finds shrinking_from above the size goes on clearing: on opening, and before the export may grow.

Not locked here: the pool's lock covers every call.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from nbdzram.engine.must cimport must
from nbdzram.engine.publish cimport publish32, publish64


cdef void entry_write(
    ExportEntry* entry, const char* name, uint32_t name_length, uint64_t size, bint read_only
) noexcept nogil:
    """Make a free entry ready to be published: an export without blocks, of the next generation."""
    cdef uint32_t generation = entry.generation + 1
    must(entry.state == ENTRY_FREE, b"only a free entry of the export directory is written")
    must(name_length <= NAME_MAX, b"an export's name fits its entry")
    memset(entry, 0, sizeof(ExportEntry))
    entry.flags = READ_ONLY_FLAG if read_only else 0
    entry.size = size
    entry.name_length = name_length
    memcpy(entry.name, name, name_length)
    entry.generation = generation


cdef void entry_share(ExportEntry* entry, const ExportEntry* source) noexcept nogil:
    """Give an entry that is written and still free the blocks of another, whose table has one parent more then."""
    must(entry.state == ENTRY_FREE and source.state == ENTRY_LIVE, b"a clone that is none yet is made of a live export")
    entry.size = source.size
    entry.shrinking_from = source.shrinking_from
    entry.root = source.root


cdef void entry_publish(ExportEntry* entry, Field field, uint64_t value) noexcept nogil:
    """Give one field of an entry its new value; true with this store."""
    if field == STATE:
        publish32(&entry.state, <uint32_t>value)
    elif field == SIZE:
        publish64(&entry.size, value)
    else:
        publish64(&entry.shrinking_from, value)
