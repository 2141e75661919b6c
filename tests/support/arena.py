"""The bytes of an arena, from outside: what lies where. The layout is that of nbdzram/engine/format.pyx."""

from __future__ import annotations

import mmap
import struct

UNIT = 65536
PAGE = 4096
SEGMENTS_AT = 1 * UNIT
EXPORTS_AT = 5 * UNIT
ENTRY_SIZE = 512
NAME_AT = 24  # in an entry of the export directory
HEADS_AT = 280
HEAD_SIZE = 64
CURRENT_AT = 408
ROOT_AT = 416
OLD_ROOT_AT = 16  # format 1
FIRST_UNIT = 37  # that has no fixed owner
BRANCHES = 4  # levels of them above a leaf
REF = 1 << 55  # one holder, in a cell's word
FORWARD = 15
FILL = 14


class Arena:
    """An arena's bytes: a mapping of a file in use, or a copy of one."""

    def __init__(self, view: mmap.mmap | bytearray) -> None:
        self.view = view

    def word(self, place: int) -> int:
        (word,) = struct.unpack_from("<Q", self.view, place)
        return int(word)

    def set_word(self, place: int, word: int) -> None:
        struct.pack_into("<Q", self.view, place, word)

    def cell(self, handle: int) -> int:
        """Where a handle's cell lies."""
        (unit,) = struct.unpack_from("<I", self.view, SEGMENTS_AT + handle // 65536 * 4)
        return int(unit) * UNIT + 16 * (handle % 65536)

    def entry(self, export: int) -> int:
        """Where an export's entry of the directory lies."""
        return EXPORTS_AT + export * ENTRY_SIZE

    def root(self, export: int = 0) -> int:
        """Where the root of an export's block table stands."""
        return self.entry(export) + ROOT_AT

    def word_at(self, block: int = 0, level: int = 0, export: int = 0) -> int:
        """Where the word of a level leading to a block stands: of level 0 its entry, of 1 what names its leaf."""
        place = self.root(export)
        for below in range(BRANCHES, level - 1, -1):
            page = self.word(place) >> 32
            assert page, f"a hole above block {block}"
            place = page * PAGE + (block >> 9 * below) % 512 * 8
        return place

    def leaf(self) -> int:
        """Where the first leaf of the first export lies."""
        return self.word_at()

    def object_of(self, handle: int) -> int:
        """Where the bytes of an object in slot 0 lie."""
        word = self.word(self.cell(handle))
        assert word >> 16 & 0x7FF == 0
        return (word >> 27 & 0xFFFFFFF) * UNIT
