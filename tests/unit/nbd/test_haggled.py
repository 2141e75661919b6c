"""What options are answered in each state of a server, and at each edge of what they carry: haggled.txt has all of it.

python -m tests.unit.nbd.test_haggled        writes it anew, after a change that is meant
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from nbdzram.config import TlsMode
from nbdzram.nbd.handshake import Enter, Event, Handshake, HandshakeError, Policy, Send, Upgrade
from tests.wire import OPTION_REPLY_MAGIC, name_and_infos, name_and_queries, option, split_option_replies

HAGGLED = Path(__file__).with_name("haggled.txt")
DISK = b"disk"
NO_EXPORT = b"nope"
TITLES = "-- "
AS_IT_COMES = Policy()

Feed = Callable[[Handshake, bytes], Iterator[Event]]


@dataclass(frozen=True)
class Shown:
    name: str
    size_bytes: int = 3 << 20
    read_only: bool = False
    description: str = ""


class Shelf:
    """Exports; None is one that this peer may not see. The first is the default one."""

    def __init__(self, *offers: Shown | None) -> None:
        self._offers = offers

    def find(self, name: str) -> Shown | None:
        return next((offer for offer in self._offers if offer and name in ("", offer.name)), None)

    def offers(self) -> Sequence[Shown | None]:
        return self._offers


TWO = Shelf(Shown("disk", description="a disk"), Shown("frozen", 5 << 20, read_only=True))
UNDER_TLS = Shelf(Shown("secret", 7 << 20))


def many(count: int, *, hidden: Sequence[int] = ()) -> Shelf:
    return Shelf(*(None if at in hidden else Shown(f"disk{at}") for at in range(count)))


@dataclass(frozen=True)
class Haggling:
    """A title, and what a client sends of which the answers are told; `before` is sent first."""

    title: str
    asked: tuple[bytes, ...]
    before: bytes = b""
    flags: int = 3
    policy: Policy = AS_IT_COMES
    shelf: Shelf = TWO
    starts_tls: bool = False
    begins_under_tls: bool = False
    in_the_clear: bytes = b""
    drains: bool = False
    full: bool = True  # what is told of an answer: all of it, or its kinds


SETTLED = {
    "simple": b"",
    "structured": option(8),
    "extended": option(11),
    "structured, contexts": option(8) + option(10, name_and_queries(DISK, b"base:allocation")),
    "extended, contexts": option(11) + option(10, name_and_queries(DISK, b"base:allocation", b"nbdzram:fold")),
}
RIGHT = {
    1: DISK,
    6: name_and_infos(DISK),
    7: name_and_infos(DISK),
    9: name_and_queries(DISK),
    10: name_and_queries(DISK, b"base:allocation"),
}
NUMBERS = (0, *range(1, 13), 1 << 31)


def by_state() -> Iterator[Haggling]:
    """Every option, in every state in which a server and a client can be."""
    for (tls, active), flags, drains in product(
        (
            (TlsMode.OFF, False),
            (TlsMode.ON, False),
            (TlsMode.ON, True),
            (TlsMode.REQUIRE, False),
            (TlsMode.REQUIRE, True),
        ),
        (0, 1, 2, 3),
        (False, True),
    ):
        title = f"TLS {tls.value}{', active' * active}, client flags {flags}{', draining' * drains}"
        asked = tuple(option(number, RIGHT.get(number, b"")) for number in NUMBERS)
        policy = Policy(tls=tls)
        yield Haggling(title, asked, flags=flags, policy=policy, begins_under_tls=active, drains=drains, full=False)
    for settled, before in SETTLED.items():
        asked = tuple(option(number, RIGHT.get(number, b"")) for number in NUMBERS)
        yield Haggling(f"settled: {settled}", asked, before=before)
        yield Haggling(
            f"settled: {settled}; then TLS", asked, before=before, policy=Policy(tls=TlsMode.ON), starts_tls=True
        )
    yield Haggling("no list", (option(3), option(6, RIGHT[6])), policy=Policy(list_exports=False))
    yield Haggling("TLS twice", (option(5),), policy=Policy(tls=TlsMode.ON), begins_under_tls=True)


def at_edges() -> Iterator[Haggling]:
    """What options carry, just short enough and just too long, and cut off at each byte."""
    whole = {
        6: name_and_infos(DISK, 0, 3),
        10: name_and_queries(DISK, b"base:allocation"),
        9: name_and_queries(DISK, b"x:"),
    }
    for number, data in whole.items():
        lengths = tuple(option(number, data[:length]) for length in range(len(data) + 1))
        yield Haggling(f"option {number} of each length", (*lengths, option(number, data + b"x")), before=option(8))
    for number, data in ((3, b"x"), (5, b"x"), (8, b"x"), (11, b"x"), (99, b"x" * 1000)):
        yield Haggling(f"option {number} with data", (option(number, data),), policy=Policy(tls=TlsMode.ON))
    infos = (0, 1, 2, 3, 4, 0xFFFF)
    for name in (b"", DISK, b"frozen", NO_EXPORT, b"d\0k", b"d\xffk", b"n" * 300, b"n" * 4096, b"n" * 4097):
        told = f"{len(name)} bytes {name[:6]!r}"
        asked = (
            option(1, name),
            *(option(6, name_and_infos(name, info)) for info in infos),
            option(7, name_and_infos(name, *infos)),
            option(9, name_and_queries(name, b"nbdzram:")),
            option(10, name_and_queries(name, b"nbdzram:fold")),
        )
        yield Haggling(f"a name of {told}", asked, before=option(8))
    queries = (
        (b"base",),
        (b":",),
        (b"base:",),
        (b"base:x",),
        (b"nbdzram:fold", b"base:"),
        (b"q" * 90,),
        (b"\xff:",),
        (b"x\0:",),
    )
    longest = (b"x:" + b"q" * 4094,), (b"x:" + b"q" * 4095,), (b"x:",) * 64, (b"x:",) * 65
    asked = tuple(
        option(number, name_and_queries(DISK, *query)) for query in (*queries, *longest) for number in (9, 10)
    )
    yield Haggling("queries", asked, before=option(8))
    yield Haggling("types", tuple(option(6, name_and_infos(DISK, *range(9, 9 + count))) for count in (1024, 1025)))
    for size in (32 << 10, (32 << 10) + 1):
        yield Haggling(
            f"{size} bytes", tuple(option(number, bytes(size)) for number in (3, 6, 10, 99)), before=option(8)
        )
    for size in (4096, 4097):
        yield Haggling(f"export name of {size} bytes that is announced", (option(1, size=size),))
    yield Haggling("the empty name without a default", (option(1), option(6, name_and_infos(b""))), shelf=Shelf())
    yield Haggling("wrong beginnings", (b"IHAVEOPS" + bytes(8), b"\0" * 16))
    for flags in (4, 7, 1 << 31):
        yield Haggling(f"client flags {flags:#x}", (option(3),), flags=flags)
    policy = Policy(payload_limit=1 << 20)
    yield Haggling("another limit of payloads", (option(6, name_and_infos(DISK, 3)),), policy=policy)


def in_a_row() -> Iterator[Haggling]:
    """What one option leaves for those behind it; and how many there may be."""
    first, second = name_and_queries(DISK, b"base:allocation"), name_and_queries(b"frozen", b"nbdzram:fold")
    go = option(7, name_and_infos(DISK))
    bad = {
        "another export": option(10, second),
        "no export": option(10, name_and_queries(NO_EXPORT, b"base:allocation")),
        "nothing known": option(10, name_and_queries(DISK, b"x:")),
        "too long": option(10, bytes(40_000)),
        "a list": option(9, first),
        "structured again": option(8),
        "extended": option(11),
        "no option": option(99),
    }
    for what, between in bad.items():
        yield Haggling(f"contexts, then {what}", (go,), before=option(8) + option(10, first) + between)
        yield Haggling(f"the same, by name: {what}", (option(1, DISK),), before=option(8) + option(10, first) + between)
    for count in (0, 1, 7, 8, 9, 16, 17):
        yield Haggling(f"a list of {count}", (option(3),), shelf=many(count))
    yield Haggling("a list of 16, of which 5 are hidden", (option(3),), shelf=many(16, hidden=(0, 3, 7, 8, 15)))
    for name in (4071, 4072):  # with header, length and description a quarter of what a slice may be
        shelf = Shelf(*(Shown("n" * name, description="d" * 4096) for _ in range(6)))
        yield Haggling(f"names of {name} bytes", (option(3),), shelf=shelf, full=False)
    for listed in (0, 3):
        enough = 5 + 8 * listed
        before = option(3) + option(99) * (enough - 3)
        shelf, policy = many(listed), Policy(option_limit=5)
        yield Haggling(
            f"options behind a list of {listed}", (option(99) * 2,), before=before, shelf=shelf, policy=policy
        )
        yield Haggling("the same, and ABORT", (option(99) + option(2),), before=before, shelf=shelf, policy=policy)
        yield Haggling(
            "the same, one more, and ABORT", (option(99) * 2 + option(2),), before=before, shelf=shelf, policy=policy
        )
    policy = Policy(tls=TlsMode.ON)
    yield Haggling("bytes in the clear", (option(3),), policy=policy, starts_tls=True, in_the_clear=option(3))


def at_once(handshake: Handshake, sent: bytes) -> Iterator[Event]:
    handshake.receive(sent)
    while (event := handshake.next_event()) is not None:
        yield event


def byte_by_byte(handshake: Handshake, sent: bytes) -> Iterator[Event]:
    """As far as it is looked at what comes; the middle of what is long makes no difference."""
    pieces = [sent[at : at + 1] for at in range(len(sent))] if len(sent) < 200 else [sent[:30], sent[30:-1], sent[-1:]]
    for piece in pieces:
        yield from at_once(handshake, piece)


def told(haggling: Haggling, feed: Feed) -> Iterator[str]:
    """What each option is answered, each on a connection of its own: a line each, or all in one."""
    yield TITLES + haggling.title
    answers = [" ".join(answered(haggling, asked, feed)) for asked in haggling.asked]
    yield from answers if haggling.full else [" | ".join(answers)]


def answered(haggling: Haggling, asked: bytes, feed: Feed) -> Iterator[str]:
    handshake = Handshake(haggling.shelf, haggling.policy, tls_active=haggling.begins_under_tls)
    number, size = struct.unpack(">II", asked[8:16])
    yield f"{number}, {size} bytes:" if haggling.full else f"{number}"
    try:
        for _ in feed(handshake, struct.pack(">I", haggling.flags) + haggling.before):
            pass
        if haggling.starts_tls:
            assert [type(event) for event in feed(handshake, option(5))] == [Upgrade]
            handshake.receive(haggling.in_the_clear)
            handshake.tls_started(UNDER_TLS)
        handshake.shutting_down = haggling.drains
        for event in feed(handshake, asked):
            yield from said(event, full=haggling.full)
        rest = handshake.take_rest()
        assert not rest, rest
    except HandshakeError as error:
        yield f"ends, {error.cause}: {error}" if haggling.full else f"ends, {error.cause}"
    if handshake.tls_active != haggling.begins_under_tls:
        yield "under TLS"


def said(event: Event, *, full: bool) -> Iterator[str]:
    """One event: its kind, its replies, what was settled."""
    yield type(event).__name__
    if event.reply[:8] == OPTION_REPLY_MAGIC.to_bytes(8) or not event.reply:
        for reply in split_option_replies(event.reply):
            data = shortened(reply.data) if full else ""
            yield f"[{reply.option}: {reply.kind & 0x7FFFFFFF}{'!' * reply.failed}{data}]"
    else:
        yield shortened(event.reply)
    if isinstance(event, Send) and event.complaint:
        yield f"complaint: {event.complaint[:60]}"
    if isinstance(event, Enter) and full:
        terms = event.terms
        contexts = ", ".join(one.wire_name for one in terms.contexts)
        yield f"{terms.offer.name} {terms.style.name} flags {terms.flags:#x} ({contexts})"


def shortened(data: bytes) -> str:
    """Sentences and what is short as they are."""
    shown = data if len(data) <= 130 else data[:24] + b"..." + data[-4:]
    return f" {len(data)} {repr(shown)[2:-1]}".rstrip()


def lines(feed: Feed) -> Iterator[str]:
    for haggling in (*by_state(), *at_edges(), *in_a_row()):
        yield from told(haggling, feed)


@pytest.mark.parametrize("feed", [at_once, byte_by_byte])
def test_each_option_is_answered_as_it_was(feed: Feed) -> None:
    assert list(lines(feed)) == HAGGLED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    HAGGLED.write_text("\n".join(lines(at_once)) + "\n", encoding="utf-8")
