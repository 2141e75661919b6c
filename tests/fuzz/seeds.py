"""Write the seed corpus: python -m tests.fuzz.seeds. Small valid conversations, from which a fuzzer starts."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.fuzz.arenas import EDIT
from tests.wire import name_and_infos, name_and_queries, option, request

CORPUS = Path(__file__).parent / "corpus"
FLAGS = struct.pack(">I", 3)
NAME = name_and_infos(b"disk", 1, 2, 3)
CONTEXTS = name_and_queries(b"disk", b"base:allocation", b"nbdzram:", b"base:allocation")

HANDSHAKES = {
    "export-name": b"\0\3" + struct.pack(">I", 0) + option(1, b"disk"),
    "abort": b"\0\3" + FLAGS + option(2, b"bye"),
    "list": b"\0\3" + FLAGS + option(3) + option(3, b"x"),
    "list-off": b"\4\3" + FLAGS + option(3),
    "info-go": b"\0\3" + FLAGS + option(6, NAME) + option(7, name_and_infos(b"nobody")) + option(7, NAME),
    "structured": b"\0\3" + FLAGS + option(8) + option(9, CONTEXTS) + option(10, CONTEXTS) + option(7, NAME),
    "extended": b"\0\3" + FLAGS + option(11) + option(8) + option(10, CONTEXTS) + option(7, NAME) + b"rest",
    "contexts-first": b"\0\3" + FLAGS + option(10, CONTEXTS) + option(9, name_and_queries(b"disk")),
    "unknown": b"\0\3" + FLAGS + option(4) + option(99, b"some data") + option(3),
    "long": b"\0\3" + FLAGS + option(7, bytes(33000)) + option(2),
    "starttls": b"\1\3" + FLAGS + option(8) + option(5) + b"\x16\x03\x01",
    "tls-required": b"\2\3" + FLAGS + option(3) + option(7, NAME) + option(5),
    "tls-twice": b"\x09\3" + FLAGS + option(5) + option(7, NAME),
    "bad-flags": b"\0\3" + struct.pack(">I", 8),
    "bad-magic": b"\0\3" + FLAGS + b"IHAVENOT" + bytes(8),
    "snowman": b"\0\3" + FLAGS + option(7, name_and_infos("\N{SNOWMAN}".encode())),
    "not-utf8": b"\0\3" + FLAGS + option(7, name_and_infos(b"\xff\0")),
}


def session(style: int) -> bytes:
    """Every command once, and some that are refused."""
    wide = style == 2
    carried = 32 if wide else 0
    parts = [
        request(1, 10, 5000, flags=carried | 1, cookie=1, extended=wide) + b"w" * 5000,
        request(0, 0, 9000, cookie=2, extended=wide),
        request(0, 0, 65536, cookie=3, flags=4, extended=wide),
        request(3, 0, 0, cookie=4, extended=wide),
        request(4, 0, 8192, cookie=5, extended=wide),
        request(5, 0, 100, cookie=6, extended=wide),
        request(6, 100, 5000, flags=2 | 16, cookie=7, extended=wide),
        request(7, 0, 65536, cookie=8, extended=wide),
        request(7, 0, 65536, cookie=9, flags=8, extended=wide),
        request(0, 65000, 1000, cookie=10, extended=wide),
        request(1, 65000, 1000, flags=carried, cookie=11, extended=wide) + bytes(1000),
        request(77, 0, 1, cookie=12, extended=wide),
        request(0, 0, 0, flags=512, cookie=13, extended=wide),
    ]
    if wide:
        parts.append(request(7, 0, 12, flags=32, cookie=14, extended=True) + struct.pack(">QI", 4096, 1))
        parts.append(request(4, 0, 10, flags=32, cookie=15, extended=True) + bytes(10))
    return b"".join([*parts, request(2, 0, 0, extended=wide)])


def circumstances(style: int, bits: int) -> bytes:
    """A first byte that chooses `style` and has at least `bits` of the rest set."""
    return bytes([next(value for value in range(256) if value % 3 == style and value & bits == bits), 9])


TRANSMISSIONS = {
    f"{name}-{bits:02x}": circumstances(style, bits) + session(style)
    for style, name in enumerate(("simple", "structured", "extended"))
    for bits in (0, 4, 8, 16, 32)
}


FORGERIES = {
    "nothing": b"",
    "name-is-no-text": EDIT.pack(3, 32, 15, 0xF7),
    "leaf-elsewhere": EDIT.pack(1, 0, 10, 5519032975360),
    "entry-of-another": EDIT.pack(0, 0, 3, 9),
    "entry-repeats": EDIT.pack(0, 16, 3, 7),
    "root-elsewhere": EDIT.pack(1, 16, 0, 600),
    "longer": EDIT.pack(2, 1, 3, 0xFFF),
    "in-another-slot": EDIT.pack(2, 2, 3, 9),
    "many-holders": EDIT.pack(2, 4, 3, 511),
    "forward": EDIT.pack(2, 0, 3, 15),
    "cell-of-another": EDIT.pack(2, 32, 3, 4),
    "smaller": EDIT.pack(3, 16, 2, 4096),
    "deleting": EDIT.pack(3, 0, 0, 2),
    "no-cells": EDIT.pack(4, 1, 0, 0),
    "dictionary-elsewhere": EDIT.pack(5, 0, 0, 40 | 5000 << 32),
    "newer": EDIT.pack(6, 1, 0, 3),
    "any-word": EDIT.pack(7, 3, 20, 12345),
    "cut-off": EDIT.pack(7, 128, 20, 100),
}

CORPORA = {"haggle": HANDSHAKES, "transmit": TRANSMISSIONS, "forge": FORGERIES}


def main() -> None:
    for target, seeds in CORPORA.items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (directory / name).write_bytes(content)


if __name__ == "__main__":
    main()
