"""What options carry: the bytes behind an option's header, taken apart, and texts that go into replies.

Straight functions without state; `handshake` decides what an option means. Section names are those of doc/proto.md
(see constants).
"""

from __future__ import annotations

import struct

from nbdzram.nbd.constants import STRING_LIMIT, Reply

QUERY_LIMIT = 64
"""Queries for metadata contexts in one option: clients send one to three, and each costs a microsecond and a string."""

INFO_LIMIT = 1024
"""Information types that one option asks for; the protocol knows four."""


class Refusal(Exception):
    """An option gets an error reply, with a sentence for people, and haggling goes on."""

    def __init__(self, reply: Reply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


def parse_name(raw: bytes) -> str:
    """An export's name: the whole of EXPORT_NAME's data, or a part of others'. Raises Refusal."""
    return _decode(raw, "export name")


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """Section "Option types", INFO: name length, name, count, information types; nothing behind. Raises Refusal."""
    if len(data) < 6:
        raise Refusal(Reply.ERR_INVALID, f"{len(data)} bytes cannot hold a name and a count of information types")
    name_size = int.from_bytes(data[:4])
    if name_size > len(data) - 6:
        raise Refusal(Reply.ERR_INVALID, f"a name of {name_size} bytes does not fit {len(data)} bytes of data")
    count = int.from_bytes(data[4 + name_size : 6 + name_size])
    types = data[6 + name_size :]
    if count > INFO_LIMIT:
        raise Refusal(Reply.ERR_TOO_BIG, f"{count} information types: the limit is {INFO_LIMIT}")
    if len(types) != 2 * count:
        raise Refusal(Reply.ERR_INVALID, f"{count} information types announced, {len(types)} bytes came")
    return parse_name(data[4 : 4 + name_size]), frozenset(value for (value,) in struct.iter_unpack(">H", types))


def parse_meta_context(data: bytes) -> tuple[str, frozenset[str]]:
    """Section "SET_META_CONTEXT": an export's name, a count, and that many queries. Raises Refusal.

    A set of queries: one that is given twice is answered once.
    """
    strings = _Strings(data)
    name = strings.take_string()
    queries = set()
    count = strings.take_count()
    if count > QUERY_LIMIT:
        raise Refusal(Reply.ERR_TOO_BIG, f"{count} queries: the limit is {QUERY_LIMIT}")
    for _ in range(count):
        query = _decode(strings.take_string(), "query")
        if ":" not in query:
            raise Refusal(Reply.ERR_INVALID, f"query {query[:80]!r} has no namespace")
        queries.add(query)
    if strings.rest:
        raise Refusal(Reply.ERR_INVALID, f"{strings.rest} bytes behind the last query")
    return parse_name(name), frozenset(queries)


def text_bytes(text: str) -> bytes:
    """UTF-8 of at most STRING_LIMIT bytes and without NUL, cut between characters (section "Conventions")."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode()[:STRING_LIMIT].decode(errors="ignore").encode()


class _Strings:
    """Cut length-prefixed strings off an option's data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def rest(self) -> int:
        return len(self._data) - self._position

    def take_count(self) -> int:
        if self.rest < 4:
            raise Refusal(Reply.ERR_INVALID, f"a length needs 4 bytes, {self.rest} are left")
        self._position += 4
        return int.from_bytes(self._data[self._position - 4 : self._position])

    def take_string(self) -> bytes:
        size = self.take_count()
        if size > self.rest:
            raise Refusal(Reply.ERR_INVALID, f"a string of {size} bytes does not fit the {self.rest} that are left")
        self._position += size
        return self._data[self._position - size : self._position]


def _decode(raw: bytes, what: str) -> str:
    """Section "Conventions": at most STRING_LIMIT bytes of UTF-8 without NUL."""
    if len(raw) > STRING_LIMIT:
        raise Refusal(Reply.ERR_INVALID, f"{what} of {len(raw)} bytes: the limit is {STRING_LIMIT}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Refusal(Reply.ERR_INVALID, f"{what} is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise Refusal(Reply.ERR_INVALID, f"{what} contains NUL at byte {raw.index(0)}")
    return text
