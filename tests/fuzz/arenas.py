"""Arenas whose writer knows every check: what opening must refuse, or live with.

A forgery is a valid arena some words of which say otherwise, with every check made right again, so that a search gets
behind the checks which stop damage by accident. What must hold: opening refuses it (ArenaError) and leaves it as it is;
or all that clients and operators do with it then ends in answers or errors, never in a crash or a hang.

An input is a row of edits, of EDIT bytes each: what is edited, where, and what it says now. Places and values are taken
modulo what there is, and a little more, so that most of them mean something.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from nbdzram.engine.codec import digest_of
from nbdzram.engine.fold import Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import ArenaError
from tests.faults.contents import BLOCK, FAR, SIZE, mixed, noise, repeated, run, sparse
from tests.faults.damage import Image, use
from tests.support.arena import (
    BRANCHES,
    CURRENT_AT,
    HEAD_SIZE,
    HEADS_AT,
    NAME_AT,
    PAGE,
    SEGMENTS_AT,
    UNIT,
)
from tests.support.arena import Arena as Bytes

EDIT = struct.Struct("<BBHQ")
MOST_EDITS = 12
WORD = (1 << 64) - 1
NAME_ROOM = 256
EXPORTS = 4
CELL_BYTES = 16
SEED_AT, IDENTITY_AT, DICTIONARIES_AT, DIGESTS_AT = 16, 80, 88, 120
KEY_DICTIONARY, KEY_CURRENT = 10, 12
BLOCKS = (*range(12), 511, 512, FAR, FAR + 1)
HOME = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


def mix(one: int, other: int) -> int:
    """nbdzram_mix of nbdzram/engine/format.pxd."""
    product = (one ^ 0x9E3779B97F4A7C15) * (other ^ 0xD6E8FEB86659FD93)
    return (product ^ product >> 64) & WORD


def checked_word(seed: int, key: int, number: int, value: int) -> int:
    value &= (1 << 48) - 1
    return value << 16 | (mix(mix(seed ^ key << 56, number) ^ value, (seed + key) & WORD) & 0xFFFF or 1)


@functools.cache
def original() -> Image:
    """An arena with every kind of content, small enough to be written hundreds of times a second."""
    path = HOME / f"nbdzram-forged-{os.getpid()}.original"
    with Pool(path=str(path)) as pool:
        plain, gone = pool.create("plain", SIZE), pool.create("gone", SIZE)
        for number, block in enumerate(BLOCKS):
            plain.write(block * BLOCK, (sparse, noise, mixed, repeated)[number % 4](number // 3))
            gone.write(block * BLOCK, sparse(number))
        run(Recompress(pool, level=9, dictionary=True))
        run(Fold(pool))
        copy = pool.clone(plain, "copy")
        copy.write(0, noise(77))
        pool.delete(gone)
    image = Image.of(path)
    path.unlink()
    return image


class Forgery:
    """A copy of the original, and what may be said otherwise in it."""

    def __init__(self) -> None:
        image = original()
        self.bytes = bytearray(image.size)
        for at, page in image.pages.items():
            self.bytes[at : at + PAGE] = page
        self.arena = Bytes(self.bytes)
        self.units = len(self.bytes) // UNIT
        self.seed = self.arena.word(SEED_AT)

    def handle(self, number: int) -> int:
        """One that the first segment has, used or not."""
        return number % 200

    def place(self, level: int, block: int, export: int) -> int | None:
        """Where the word of a level leading to a block stands, as long as what leads there leads anywhere."""
        place = self.arena.root(export)
        for below in range(BRANCHES, level - 1, -1):
            place = (self.arena.word(place) >> 32) * PAGE + (block >> 9 * below) % 512 * 8
            if not PAGE <= place <= len(self.bytes) - 8:
                return None
        return place

    def say_entry(self, kind: int, place: int, value: int) -> None:
        """A block is in an object, a hole, or one word."""
        block = BLOCKS[place % len(BLOCKS)]
        at = self.place(0, block, kind % EXPORTS)
        if at is None:
            return
        if kind & 16:
            check = mix(mix(self.seed, block), self.seed ^ value) & 0xFFFF or 1
            self.arena.set_word(at, (value << 18 | check << 1 | 1) & WORD)
            return
        handle = value % 200 if not kind & 32 else value & 0xFFFFFFFF
        cell = self.arena.cell(self.handle(handle)) + 8
        fingerprint = self.arena.word(cell) if handle and cell < len(self.bytes) else 0
        check = mix(mix(self.seed, block) ^ handle, self.seed ^ fingerprint) & 0xFFFF or 1
        self.arena.set_word(at, handle << 32 | (value >> 32 & 0x7FFF) << 17 | check << 1)

    def say_branch(self, kind: int, place: int, value: int) -> None:
        """A node is somewhere, or nowhere."""
        block, export = BLOCKS[place % len(BLOCKS)], kind % EXPORTS
        level = 1 + (kind >> 2) % (BRANCHES + 1)
        if level > BRANCHES:
            at: int | None = self.arena.root(export)
            number = export
        else:
            at, number = self.place(level, block, export), block >> 9 * level
        if at is None:
            return
        page = value % (16 * self.units + 3) if not kind & 64 else value & 0xFFFFFFFF
        check = mix(mix(self.seed, level << 56 | number) ^ page, (self.seed + level) & WORD)
        self.arena.set_word(at, page << 32 | check & 0xFFFFFFFF)

    def say_cell(self, kind: int, place: int, value: int) -> None:
        """An object is of another kind or length, lies elsewhere, has other holders, is none; or is what another is."""
        at = self.arena.cell(self.handle(place))
        if at > len(self.bytes) - CELL_BYTES:
            return
        if kind & 32:
            other = self.arena.cell(self.handle(value))
            self.bytes[at : at + CELL_BYTES] = self.bytes[other : other + CELL_BYTES]
            return
        word = self.arena.word(at)
        fields = ((0, 4), (4, 12), (16, 11), (27, 28), (55, 9), (4, 32))
        shift, width = fields[(kind & 7) % len(fields)]
        if shift == 27 and not kind & 16:
            value %= self.units + 2
        mask = (1 << width) - 1
        self.arena.set_word(at, word & ~(mask << shift) | (value & mask) << shift)

    def say_head(self, kind: int, place: int, value: int) -> None:
        """An export is of another state, size, name, or which of its heads counts."""
        number = kind % EXPORTS
        entry = self.arena.entry(number)
        current = self.arena.word(entry + CURRENT_AT)
        head = entry + HEADS_AT + (current >> 16 & 1) * HEAD_SIZE
        at, width = ((0, 4), (4, 4), (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8), (48, 8))[place % 10]
        if width == 4:
            value = value & 0xFFFFFFFF if kind & 16 else value % 300
        self.bytes[head + at : head + at + width] = (value & WORD).to_bytes(8, "little")[:width]
        if kind & 32:
            self.bytes[entry + NAME_AT + place // 10 % NAME_ROOM] = value & 0xFF
        self.seal_head(number, head)
        if kind & 64:
            self.arena.set_word(entry + CURRENT_AT, checked_word(self.seed, KEY_CURRENT, number, value))

    def seal_head(self, number: int, head: int) -> None:
        entry = self.arena.entry(number)
        state, name_length, name_place = (
            int.from_bytes(self.bytes[head + at : head + at + 4], "little") for at in (0, 28, 32)
        )
        found = digest_of(bytes(self.bytes[head : head + HEAD_SIZE - 8]), self.seed ^ number)
        first, length = (name_place - 1, name_length) if name_place else (0, NAME_ROOM)
        if state and first + length <= NAME_ROOM:
            name = bytes(self.bytes[entry + NAME_AT + first : entry + NAME_AT + first + length])
            found = mix(found, digest_of(name, self.seed))
        self.arena.set_word(head + HEAD_SIZE - 8, found)

    def say_segment(self, kind: int, place: int, value: int) -> None:
        """Cells lie elsewhere."""
        at = SEGMENTS_AT + place % (4 if kind & 1 else 65536) * 4
        self.bytes[at : at + 4] = (value % (self.units + 2)).to_bytes(4, "little")

    def say_dictionary(self, kind: int, place: int, value: int) -> None:
        """A dictionary lies elsewhere or is longer."""
        number, unit, length = place % 4, value % (self.units + 2), value >> 32 & (0xFFFFF if kind & 1 else 0x3FFF)
        digest = digest_of(bytes(self.bytes[unit * UNIT : unit * UNIT + length]), self.seed)
        if kind & 2:
            digest = self.arena.word(DIGESTS_AT + 8 * number)
        self.arena.set_word(DIGESTS_AT + 8 * number, digest)
        self.arena.set_word(
            DICTIONARIES_AT + 8 * number,
            checked_word(self.seed ^ digest, KEY_DICTIONARY, number, unit << 20 | length),
        )

    def say_superblock(self, kind: int, place: int, value: int) -> None:
        """The arena is of another version, has other features, other size classes."""
        at, width = ((8, 4), (12, 4), (24, 8), (72, 8), (152, 8), (56, 8))[place % 6]
        self.bytes[at : at + width] = (value % 4 if kind & 1 else value).to_bytes(8, "little")[:width]
        version, page_size = struct.unpack_from("<II", self.bytes, 8)
        found = mix(self.seed, self.arena.word(24))
        found = mix(found, version << 32 | page_size)
        self.arena.set_word(IDENTITY_AT, mix(found, self.arena.word(72)) | 1)

    def say_word(self, kind: int, place: int, value: int) -> None:
        """Any word of a page in use, or its end."""
        pages = sorted(original().pages)
        page = pages[place % len(pages)]
        if kind & 128:
            del self.bytes[max(PAGE, page + (value & 0xFFFF)) :]
        elif page <= len(self.bytes) - PAGE:
            self.arena.set_word(page + kind % 64 * 64 + (value & 7) * 8, value)

    def edit(self, source: bytes) -> None:
        says: tuple[Callable[[int, int, int], None], ...] = (
            self.say_entry, self.say_branch, self.say_cell, self.say_head,
            self.say_segment, self.say_dictionary, self.say_superblock, self.say_word,
        )  # fmt: skip
        whole = len(source) // EDIT.size * EDIT.size
        for what, kind, place, value in list(EDIT.iter_unpack(source[:whole]))[:MOST_EDITS]:
            with contextlib.suppress(IndexError, struct.error):  # one before cut off or moved what this one is about
                says[what % len(says)](kind, place, value)


def forge(source: bytes) -> None:
    """What `source` makes of an arena is refused and stays as it is, or can be lived with."""
    forgery = Forgery()
    forgery.edit(source)
    path = HOME / f"nbdzram-forged-{os.getpid()}"
    content = bytes(forgery.bytes)
    try:
        path.write_bytes(content)
        try:
            pool = Pool(path=str(path))
        except ArenaError:
            assert path.read_bytes() == content, "a refused opening has changed the arena"
            return
        with pool:
            use(pool, len(source))
    finally:
        path.unlink(missing_ok=True)
