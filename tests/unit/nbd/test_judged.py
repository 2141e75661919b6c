"""How each request is judged in each state of a connection, and how each reply lies on the wire: judged.txt.

python -m tests.unit.nbd.test_judged        writes it anew, after a change that is meant
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from nbdzram.nbd.constants import Command, ReplyStyle
from nbdzram.nbd.transmission import error_reply, read_reply, request_at, status_chunk, verdict_on
from nbdzram.nbd.verdicts import Asked, Verdict, error_of, explain
from tests.wire import request

JUDGED = Path(__file__).with_name("judged.txt")
SIZE = 1 << 20
LIMITS = {"payload_limit": 1 << 16, "unfragmented_limit": 1 << 14}
COOKIE = b"cookie12"
PLACES = (
    *((0, 0), (0, 1), (0, SIZE), (0, SIZE + 1), (1, SIZE), (SIZE, 0), (SIZE, 1), (SIZE + 1, 0), (SIZE - 512, 512)),
    *((0, 1 << 14), (0, (1 << 14) + 1), (0, 1 << 16), (0, (1 << 16) + 1), (2**64 - 1, 1), (2**63, 2**32 - 1)),
)
NAMES = {verdict: verdict.name.lower() for verdict in Verdict}


def judged() -> Iterator[str]:
    """A line for each command, flags and state: the verdicts at each place, those that follow each other told once."""
    for command, style, read_only, contexts in itertools.product(range(10), ReplyStyle, (False, True), (0, 1)):
        for flags in (0, *(1 << bit for bit in range(7)), 5, 1 << 15):
            told = []
            for offset, length in PLACES:
                asked = request(command, offset, length, flags=flags, extended=style is ReplyStyle.EXTENDED)
                parsed = request_at(asked, style)
                assert parsed is not None
                state = {"style": style, "read_only": read_only, "context_count": contexts}
                verdict = Verdict(verdict_on(parsed, size=SIZE, **state, **LIMITS))  # type: ignore[arg-type]
                told.append(NAMES[verdict])
            groups = [(name, len(list(group))) for name, group in itertools.groupby(told)]
            verdicts = " ".join(name if count == 1 else f"{name}*{count}" for name, count in groups)
            read = " read-only" * read_only
            yield f"{command} {style.name.lower()}{read} {contexts} contexts, flags {flags}: {verdicts}"


def lines() -> Iterator[str]:
    before = ""
    for line in judged():
        verdicts = line.partition(": ")[2]
        if verdicts != before:  # or else it is as the state before
            yield line
        before = verdicts
    yield "-- told"
    for verdict, command in itertools.product(Verdict, (*Command, 99)):
        if verdict is not Verdict.OK:
            asked = Asked(command, 5, COOKIE, SIZE - 1, 4096)
            sentence = explain(verdict, asked, size=SIZE, limit=1 << 16)
            error = f"{error_of(verdict, command).name}{' wrong' * verdict.invalid_io}"
            yield f"{verdict.name} {command}: {error}: {sentence}"
    yield "-- parsed"
    for style in ReplyStyle:
        for command, flags in itertools.product((0, 1, 7), (0, 1, 32)):
            whole = request(command, 2**40, 70_000, flags=flags, extended=style is ReplyStyle.EXTENDED)
            assert request_at(whole[:-1], style) is None
            yield f"{style.name} {whole.hex(' ', 4)}: {request_at(whole + b'x', style)}"
    yield "-- replies"
    yield from replies()


def replies() -> Iterator[str]:
    contents = (
        *(b"", b"a", bytes(1), bytes(511), bytes(512), b"\0" * 511 + b"a", b"a" + bytes(4095), bytes(7), bytes(8)),
        *(b"a" * 4096 + bytes(4096), bytes(4096) + b"a" * 4096 + bytes(8192) + b"b", bytes(4095) + b"a" + bytes(600)),
    )
    for style, whole, done in itertools.product(ReplyStyle, (False, True), (False, True)):
        for content, offset in itertools.product(contents, (0, 4096 - 512, 3)):
            reply = read_reply(style, COOKIE, 2**33, offset, content, whole=whole, done=done)
            yield f"{style.name}{' whole' * whole}{' done' * done} {offset} {short(content)}: {short(reply)}"
    for style in (ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED):
        for extents in ([(4096, 3)], [(1, 0), (2**32 - 1, 1), (512, 2**31)]):
            yield f"status {short(status_chunk(style, COOKIE, 2**33, 7, extents, len(extents) == 1))}"
    for style, at in itertools.product(ReplyStyle, (None, 0, 2**40)):
        yield f"error {style.name} {at}: {short(error_reply(style, COOKIE, 2**33, 28, b'a sentence', at))}"


def short(content: bytes) -> str:
    """Its runs of equal bytes, each with its length."""
    runs = ((byte, len(list(group))) for byte, group in itertools.groupby(content))
    return " ".join(f"{byte:02x}" if count == 1 else f"{byte:02x}*{count}" for byte, count in runs) or "nothing"


def test_each_request_is_judged_and_answered_as_it_was() -> None:
    assert list(lines()) == JUDGED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    JUDGED.write_text("\n".join(lines()) + "\n", encoding="utf-8")
