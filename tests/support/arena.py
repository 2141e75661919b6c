"""The bytes of an arena, from outside: what lies where. The layout is that of nbdzram/engine/format.pyx."""

from __future__ import annotations

import mmap
import struct

from nbdzram.engine.codec import digest_of

UNIT = 65536
PAGE = 4096
SEED_AT = 16
SEGMENTS_AT = 1 * UNIT
EXPORTS_AT = 5 * UNIT
ENTRY_SIZE = 512
NAME_AT = 24  # in an entry of the export directory
HEADS_AT = 280
HEAD_SIZE = 64
CHECK_AT = 56  # in a head
NAME_ROOM = 256
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

    def forge_name(self, export: int, name: bytes) -> None:
        """Another name of as many bytes, which the entry's checks agree with."""
        at = self.entry(export)
        self.view[at + NAME_AT : at + NAME_AT + len(name)] = name
        self._seal_head(export)

    def forge_head(self, export: int, place: int, word: int) -> None:
        """Another word in the head that counts, which its checks agree with."""
        self.set_word(self._head(export) + place, word)
        self._seal_head(export)

    def forge_same(self, block: int, repeated: int) -> None:
        """Let a block of the first export repeat a small word."""
        check = _mix(_mix(self.word(SEED_AT), block), self.word(SEED_AT) ^ repeated) & 0xFFFF or 1
        self.set_word(self.word_at(block), repeated << 18 | check << 1 | 1)

    def _head(self, export: int) -> int:
        """Where the head that counts lies."""
        at = self.entry(export)
        return at + HEADS_AT + (self.word(at + CURRENT_AT) >> 16 & 1) * HEAD_SIZE

    def _seal_head(self, export: int) -> None:
        at, head, seed = self.entry(export), self._head(export), self.word(SEED_AT)
        checked = digest_of(bytes(self.view[head : head + CHECK_AT]), seed ^ export)
        room = digest_of(bytes(self.view[at + NAME_AT : at + NAME_AT + NAME_ROOM]), seed)
        self.set_word(head + CHECK_AT, _mix(checked, room))

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

    def forge_word(self, page: int, block: int, level: int) -> None:
        """Let the word of a level leading to a block name a page, with the check that it had then."""
        seed = self.word(SEED_AT)
        place_key = level << 56 | block >> 9 * level
        check = _mix(_mix(seed, place_key) ^ page, seed + level & (1 << 64) - 1) & 0xFFFFFFFF
        self.set_word(self.word_at(block, level), page << 32 | check)

    def leaf(self) -> int:
        """Where the first leaf of the first export lies."""
        return self.word_at()

    def object_of(self, handle: int) -> int:
        """Where the bytes of an object in slot 0 lie."""
        word = self.word(self.cell(handle))
        assert word >> 16 & 0x7FF == 0
        return (word >> 27 & 0xFFFFFFF) * UNIT


def _mix(one: int, other: int) -> int:
    product = (one ^ 0x9E3779B97F4A7C15) * (other ^ 0xD6E8FEB86659FD93)
    return (product ^ product >> 64) & 0xFFFFFFFFFFFFFFFF
