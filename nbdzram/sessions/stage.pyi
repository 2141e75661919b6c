from enum import IntEnum

class Stage(IntEnum):
    """How far the end of a session has come. Only onwards."""

    OPEN = 0
    DRAINING = 1
    HALTED = 2
    CLOSING = 3
    LOST = 4
    GONE = 5

class Ending(IntEnum):
    """Why a session ends."""

    NOT_ENDING = 0
    LEFT = 1
    CUT = 2
    LINE_BROKE = 3
    BAD_MAGIC = 4
    LONG_PAYLOAD = 5
    HALF_A_REPLY = 6
    TOO_SLOW = 7
    NO_MEMORY = 8
    BARREN_RECORDS = 9
