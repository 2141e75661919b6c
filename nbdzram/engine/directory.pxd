from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    # What an entry is; stored, so never renumbered.
    ENTRY_FREE = 0
    ENTRY_LIVE = 1
    ENTRY_DELETING = 2

    NAME_MAX = 255
    EXPORTS_MAX = 4096

    READ_ONLY_FLAG = 1

cdef enum Field:
    # What of an entry changes while it is in use; the root is its block table's (Tables).
    STATE
    SIZE
    SHRINKING_FROM

cdef struct ExportEntry:
    uint32_t state
    uint32_t flags
    uint64_t size
    uint32_t root
    uint32_t name_length
    char name[472]
    uint64_t shrinking_from  # above size: blocks from the size up to here may still be stored
    uint32_t generation      # of those that this entry has been, the how manieth this one is
    uint32_t unused

cdef void entry_write(
    ExportEntry* entry, const char* name, uint32_t name_length, uint64_t size, bint read_only
) noexcept nogil
cdef void entry_share(ExportEntry* entry, const ExportEntry* source) noexcept nogil
cdef void entry_publish(ExportEntry* entry, Field field, uint64_t value) noexcept nogil
