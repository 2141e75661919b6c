# What may be wished of a session, and what a session tells: bits of its two bells.

cdef enum:  # of its own bell, which rings at its thread
    ATTACH = 1    # begin
    GO_ON = 2     # its turn to store a large payload as it arrives has come
    DRAIN = 4     # read no more; answer what was asked for completely, then close
    ABORT = 8     # cut the connection
    EXPEL = 16    # the same, because it holds others up
    SYNCED = 32   # what was stored is on the disk, or cannot be
    RELEASE = 128 # as DRAIN, but behind the payload that arrives; and the line is not closed: another process has it
    BURY = 64     # it is GONE, and nobody rings any more: say when its thread has forgotten it

cdef enum:  # of the bell that rings at the event loop
    ENDED = 1     # why it ends is known
    SYNC = 2      # it has answers that wait for a sync, and is perhaps lost with them
    GONE_NOW = 4  # nothing is under way any more
    BURIED = 8    # and its thread has forgotten it
