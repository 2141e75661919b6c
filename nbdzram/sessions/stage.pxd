# How a session ends, and why.

cpdef enum Stage:
    # How far the end of a session has come. Only onwards: see Session.move.
    OPEN = 0        # reads, performs, answers
    DRAINING = 1    # reads no more: end of file, or the server stops. What was asked for completely is performed
    HALTED = 2      # performs no more: DISC, or a broken protocol. What is under way is answered
    CLOSING = 3     # everything is answered, and the last replies leave
    LOST = 4        # nothing can be sent any more. What is under way comes back and is dropped
    GONE = 5        # nothing is under way

cpdef enum Ending:  # why a session ends
    NOT_ENDING = 0
    LEFT = 1           # the client said so, or closed
    CUT = 2            # the server was told to
    LINE_BROKE = 3     # with an errno
    BAD_MAGIC = 4
    LONG_PAYLOAD = 5   # with its bytes
    HALF_A_REPLY = 6   # what is stored does not decode, in the middle of a reply that cannot tell it
    TOO_SLOW = 7       # with the bytes that came while others waited
    NO_MEMORY = 8
    BARREN_RECORDS = 9 # too many TLS records without data: with their number

cdef inline bint comes_after(Stage stage, Stage now) noexcept nogil:
    # May a session that is at `now` go on to `stage`? GONE comes from LOST alone: something may still be under way
    # before.
    return stage > now and (stage != GONE or now == LOST)
