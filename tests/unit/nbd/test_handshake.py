"""Option haggling, byte by byte."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdzram.config import TlsMode
from nbdzram.nbd.constants import MetaContext, Option, Reply, ReplyStyle, TransmissionFlag
from nbdzram.nbd.handshake import (
    LIST_SLICE,
    LIST_SLICE_BYTES,
    OPTION_DATA_LIMIT,
    Close,
    Enter,
    Event,
    Failure,
    Handshake,
    HandshakeError,
    Policy,
    Send,
    Upgrade,
)
from tests.wire import OptionReply, name_and_infos, name_and_queries, option, split_option_replies

FLAGS = struct.pack(">I", 3)


@dataclass(frozen=True)
class FakeOffer:
    name: str
    size_bytes: int = 1 << 20
    read_only: bool = False
    description: str = ""


class FakeDirectory:
    def __init__(self, *offers: FakeOffer) -> None:
        self._offers = offers

    def find(self, name: str) -> FakeOffer | None:
        return next((offer for offer in self._offers if not name or offer.name == name), None)

    def offers(self) -> tuple[FakeOffer, ...]:
        return self._offers


DIRECTORY = FakeDirectory(FakeOffer("disk", description="a disk"), FakeOffer("other", read_only=True))


def start(*, flags: bytes = FLAGS, tls: TlsMode = TlsMode.OFF, list_exports: bool = True) -> Handshake:
    handshake = Handshake(DIRECTORY, Policy(tls=tls, list_exports=list_exports))
    handshake.receive(flags)
    return handshake


def feed(handshake: Handshake, data: bytes) -> list[Event]:
    handshake.receive(data)
    events = []
    while (event := handshake.next_event()) is not None:
        events.append(event)
    return events


def ask(handshake: Handshake, number: int, data: bytes = b"") -> list[OptionReply]:
    (event,) = feed(handshake, option(number, data))
    return split_option_replies(event.reply)


def test_greeting_offers_exactly_fixed_newstyle_and_no_zeroes() -> None:
    assert start().greeting == b"NBDMAGICIHAVEOPT\x00\x03"


def test_unknown_client_flag_ends_the_session() -> None:
    with pytest.raises(HandshakeError, match="0x7") as caught:
        feed(start(flags=b""), struct.pack(">I", 7))
    assert caught.value.cause is Failure.CLIENT_FLAGS


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_is_served_with_the_padding_that_the_flags_ask_for(flags: int, padding: int) -> None:
    (event,) = feed(start(flags=struct.pack(">I", flags)), option(1, b"disk"))
    assert isinstance(event, Enter)
    assert event.reply[:8] == struct.pack(">Q", 1 << 20)
    assert event.reply[10:] == bytes(padding)


def test_export_name_of_an_unknown_export_ends_the_session() -> None:
    with pytest.raises(HandshakeError) as caught:
        feed(start(), option(1, b"nope"))
    assert caught.value.cause is Failure.UNKNOWN_EXPORT


def test_a_client_without_fixed_newstyle_may_only_name_an_export() -> None:
    with pytest.raises(HandshakeError, match="LIST"):
        feed(start(flags=bytes(4)), option(3))


def test_abort_is_acknowledged_at_once_and_its_data_ignored() -> None:
    handshake = start()
    (event,) = feed(handshake, b"IHAVEOPT" + struct.pack(">II", 2, 0xFFFFFFFF))
    assert isinstance(event, Close)
    assert split_option_replies(event.reply) == [OptionReply(2, Reply.ACK, b"")]
    assert feed(handshake, option(3)) == []


def test_list_names_every_export_with_its_description() -> None:
    *servers, last = ask(start(), 3)
    assert [reply.data for reply in servers] == [
        b"\x00\x00\x00\x04diska disk",
        b"\x00\x00\x00\x05other",
    ]
    assert last.kind == Reply.ACK


def test_a_description_that_could_not_be_sent_is_sent_as_far_as_it_can() -> None:
    """Section "Conventions": no NUL, at most 4096 bytes, and no half of a character."""
    handshake = Handshake(FakeDirectory(FakeOffer("a", description="x\0" + 4096 * "\u00fc")), Policy())
    handshake.receive(FLAGS)
    (told, _) = ask(handshake, 3)
    assert told.data[:5] == b"\0\0\0\1a"
    assert told.data[5:].decode() == "x\ufffd" + 2046 * "\u00fc"


def test_list_with_data_is_invalid_and_haggling_goes_on() -> None:
    handshake = start()
    (reply,) = ask(handshake, 3, b"x")
    assert reply.kind == Reply.ERR_INVALID
    assert ask(handshake, 3)[-1].kind == Reply.ACK


def test_list_can_be_turned_off() -> None:
    assert ask(start(list_exports=False), 3)[0].kind == Reply.ERR_POLICY


@pytest.mark.parametrize("number", [4, 9999, 0xFFFFFFFF])
def test_an_unknown_option_is_unsupported_and_its_data_read(number: int) -> None:
    handshake = start()
    assert ask(handshake, number, b"x" * 1000)[0].kind == Reply.ERR_UNSUP
    assert ask(handshake, 3)[-1].kind == Reply.ACK


def test_an_option_of_four_gigabytes_is_counted_and_never_stored() -> None:
    handshake = start()
    assert feed(handshake, b"IHAVEOPT" + struct.pack(">II", 7, 0xFFFFFFFF)) == []
    block = memoryview(bytes(1 << 24))
    for _ in range(255):
        handshake.receive(block)
        assert handshake.next_event() is None
        assert not handshake.take_rest()
    handshake.receive(block[:-1])
    event = handshake.next_event()
    assert isinstance(event, Send)
    assert split_option_replies(event.reply)[0].kind == Reply.ERR_TOO_BIG
    assert ask(handshake, 3)[-1].kind == Reply.ACK


def test_more_options_than_the_limit_end_the_session() -> None:
    handshake = start()
    for _ in range(128):
        ask(handshake, 99)
    with pytest.raises(HandshakeError, match="128") as caught:
        feed(handshake, option(99))
    assert caught.value.cause is Failure.TOO_MANY_OPTIONS


def test_a_bad_option_magic_ends_the_session() -> None:
    with pytest.raises(HandshakeError) as caught:
        feed(start(), b"IHAVEOPS" + bytes(8))
    assert caught.value.cause is Failure.BAD_MAGIC


@pytest.mark.parametrize("number", [6, 7])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x00\x04disk",  # no count
        b"\xff\xff\xff\xffdisk\x00\x00",  # name longer than the option
        name_and_infos(b"disk") + b"x",  # something behind
        b"\x00\x00\x00\x04disk\x00\x02\x00\x01",  # one information type of two
        name_and_infos(b"di\x00sk"),
        name_and_infos(b"\xff\xfe"),
        name_and_infos(b"n" * 4097),
    ],
)
def test_malformed_info_and_go_are_invalid_and_haggling_goes_on(number: int, data: bytes) -> None:
    handshake = start()
    (reply,) = ask(handshake, number, data)
    assert reply.kind == Reply.ERR_INVALID
    reply.data.decode()
    assert ask(handshake, 6, name_and_infos(b"disk"))[-1].kind == Reply.ACK


@pytest.mark.parametrize("name", [b"nope", b"n" * 4096, b"n" * 3000])
def test_an_unknown_export_is_told_and_haggling_goes_on(name: bytes) -> None:
    handshake = start()
    (reply,) = ask(handshake, 7, name_and_infos(name))
    assert reply.kind == Reply.ERR_UNKNOWN
    assert len(reply.data) <= 4096
    assert ask(handshake, 6, name_and_infos(b"disk"))[-1].kind == Reply.ACK


def test_info_and_go_agree_and_ignore_unknown_information_types() -> None:
    data = name_and_infos(b"disk", 1, 2, 3, 77)
    info = ask(start(), 6, data)
    (event,) = feed(start(), option(7, data))
    assert isinstance(event, Enter)
    go = split_option_replies(event.reply)
    assert [(reply.kind, reply.data) for reply in info] == [(reply.kind, reply.data) for reply in go]
    assert [int.from_bytes(reply.data[:2]) for reply in go[:-1]] == [0, 1, 2, 3]
    assert go[1].data[2:] == b"disk"
    assert struct.unpack(">III", go[3].data[2:]) == (1, 4096, 64 << 20)


def test_only_export_information_is_sent_unasked() -> None:
    replies = ask(start(), 6, name_and_infos(b"disk"))
    assert [int.from_bytes(reply.data[:2]) for reply in replies[:-1]] == [0]


def test_an_export_without_a_description_has_none_to_tell() -> None:
    replies = ask(start(), 6, name_and_infos(b"other", 2))
    assert [int.from_bytes(reply.data[:2]) for reply in replies[:-1]] == [0]


def test_the_empty_name_is_the_default_export_under_its_real_name() -> None:
    replies = ask(start(), 6, name_and_infos(b"", 1))
    assert replies[1].data[2:] == b"disk"


def test_a_read_only_export_offers_nothing_that_writes() -> None:
    (event,) = feed(start(), option(7, name_and_infos(b"other")))
    assert isinstance(event, Enter)
    flags = event.terms.flags
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)


def test_df_is_offered_only_with_structured_replies() -> None:
    handshake = start()
    (before, _) = ask(handshake, 6, name_and_infos(b"disk"))
    assert ask(handshake, 8)[0].kind == Reply.ACK
    (after, _) = ask(handshake, 6, name_and_infos(b"disk"))
    assert not int.from_bytes(before.data[-2:]) & TransmissionFlag.SEND_DF
    assert int.from_bytes(after.data[-2:]) & TransmissionFlag.SEND_DF


@pytest.mark.parametrize("number", [5, 8, 11])
def test_options_without_data_refuse_data(number: int) -> None:
    assert ask(start(tls=TlsMode.ON), number, b"x")[0].kind == Reply.ERR_INVALID


def test_extended_headers_take_precedence_over_structured_replies() -> None:
    handshake = start()
    assert ask(handshake, 8)[0].kind == Reply.ACK
    assert ask(handshake, 11)[0].kind == Reply.ACK
    assert ask(handshake, 8)[0].kind == Reply.ERR_EXT_HEADER_REQD
    (event,) = feed(handshake, option(7, name_and_infos(b"disk")))
    assert isinstance(event, Enter)
    assert event.terms.style is ReplyStyle.EXTENDED


def test_export_name_after_extended_headers_ends_the_session() -> None:
    handshake = start()
    ask(handshake, 11)
    with pytest.raises(HandshakeError, match="GO"):
        feed(handshake, option(1, b"disk"))


def test_contexts_may_be_selected_with_extended_headers_alone() -> None:
    handshake = start()
    ask(handshake, 11)
    replies = ask(handshake, 10, name_and_queries(b"disk", b"base:allocation"))
    assert [reply.kind for reply in replies] == [Reply.META_CONTEXT, Reply.ACK]


@pytest.mark.parametrize("number", [9, 10])
def test_metadata_contexts_need_structured_replies(number: int) -> None:
    assert ask(start(), number, name_and_queries(b"disk"))[0].kind == Reply.ERR_INVALID


def structured() -> Handshake:
    handshake = start()
    ask(handshake, 8)
    return handshake


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), [b"base:allocation", b"nbdzram:fold"]),
        ((b"base:",), [b"base:allocation"]),
        ((b"nbdzram:",), [b"nbdzram:fold"]),
        ((b"base:allocation", b"base:"), [b"base:allocation"]),
        ((b"qemu:dirty-bitmap:x",), []),
    ],
)
def test_listing_contexts_knows_wildcards(queries: tuple[bytes, ...], found: list[bytes]) -> None:
    replies = ask(structured(), 9, name_and_queries(b"disk", *queries))
    assert [reply.data for reply in replies[:-1]] == [bytes(4) + name for name in found]
    assert replies[-1].kind == Reply.ACK


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), []),
        ((b"base:",), []),
        ((b"base:allocation", b"base:allocation"), [b"base:allocation"]),
        ((b"nbdzram:fold", b"base:allocation"), [b"base:allocation", b"nbdzram:fold"]),
    ],
)
def test_selecting_contexts_answers_each_once(queries: tuple[bytes, ...], found: list[bytes]) -> None:
    replies = ask(structured(), 10, name_and_queries(b"disk", *queries))
    assert [reply.data[4:] for reply in replies[:-1]] == found
    ids = [reply.data[:4] for reply in replies[:-1]]
    assert len(set(ids)) == len(ids)


def contexts_after(handshake: Handshake, name: bytes = b"disk") -> tuple[MetaContext, ...]:
    (event,) = feed(handshake, option(7, name_and_infos(name)))
    assert isinstance(event, Enter)
    return event.terms.contexts


def test_a_selection_holds_for_the_same_export() -> None:
    handshake = structured()
    ask(handshake, 10, name_and_queries(b"", b"base:allocation"))
    assert contexts_after(handshake, b"disk") == (MetaContext.ALLOCATION,)


def test_a_selection_for_another_export_does_not_count() -> None:
    handshake = structured()
    ask(handshake, 10, name_and_queries(b"other", b"base:allocation"))
    assert contexts_after(handshake) == ()


def test_a_later_selection_replaces() -> None:
    handshake = structured()
    ask(handshake, 10, name_and_queries(b"disk", b"base:allocation"))
    ask(handshake, 10, name_and_queries(b"disk", b"nbdzram:fold"))
    assert contexts_after(handshake) == (MetaContext.FOLD,)


@pytest.mark.parametrize(
    "bad",
    [
        name_and_queries(b"nope", b"base:allocation"),
        name_and_queries(b"disk", b"no-namespace"),
        name_and_queries(b"disk", b"base:allocation") + b"x",
        name_and_queries(b"disk", b"base:allocation")[:-1],
        name_and_queries(b"disk", b"x:" + b"q" * 4096),
        b"",
        name_and_queries(b"disk") + bytes(OPTION_DATA_LIMIT),
    ],
)
def test_a_failed_selection_clears(bad: bytes) -> None:
    handshake = structured()
    ask(handshake, 10, name_and_queries(b"disk", b"base:allocation"))
    assert ask(handshake, 10, bad)[-1].failed
    assert contexts_after(handshake) == ()


def test_tls_off_refuses_starttls() -> None:
    assert ask(start(), 5)[0].kind == Reply.ERR_POLICY


@pytest.mark.parametrize("number", [3, 6, 7, 8, 9, 10, 11, 99])
def test_a_server_that_requires_tls_says_so_to_every_option(number: int) -> None:
    handshake = start(tls=TlsMode.REQUIRE)
    assert ask(handshake, number)[0].kind == Reply.ERR_TLS_REQD
    assert isinstance(feed(handshake, option(2))[0], Close)


def test_a_server_that_requires_tls_closes_on_export_name() -> None:
    with pytest.raises(HandshakeError) as caught:
        feed(start(tls=TlsMode.REQUIRE), option(1, b"disk"))
    assert caught.value.cause is Failure.TLS_REQUIRED


@pytest.mark.parametrize("number", [8, 11])
def test_starttls_forgets_everything_that_was_settled(number: int) -> None:
    handshake = start(tls=TlsMode.ON)
    ask(handshake, number)
    ask(handshake, 10, name_and_queries(b"disk", b"base:allocation"))
    (event,) = feed(handshake, option(5))
    assert isinstance(event, Upgrade)
    handshake.tls_started(DIRECTORY)
    assert ask(handshake, 5)[0].kind == Reply.ERR_INVALID
    (event,) = feed(handshake, option(7, name_and_infos(b"disk")))
    assert isinstance(event, Enter)
    assert event.terms.style is ReplyStyle.SIMPLE
    assert event.terms.contexts == ()


def test_bytes_in_the_clear_behind_starttls_are_never_executed() -> None:
    handshake = start(tls=TlsMode.ON)
    events = feed(handshake, option(5) + option(7, name_and_infos(b"disk")))
    assert [type(event) for event in events] == [Upgrade]
    with pytest.raises(HandshakeError) as caught:
        handshake.tls_started(DIRECTORY)
    assert caught.value.cause is Failure.TLS


def test_a_draining_server_tells_options_and_lets_abort_through() -> None:
    handshake = start()
    handshake.shutting_down = True
    assert ask(handshake, 7, name_and_infos(b"disk"))[0].kind == Reply.ERR_SHUTDOWN
    assert isinstance(feed(handshake, option(2))[0], Close)


def test_bytes_behind_go_are_the_first_of_the_transmission_phase() -> None:
    handshake = start()
    feed(handshake, option(7, name_and_infos(b"disk")) + b"request")
    assert handshake.take_rest() == b"request"


SESSION = (
    FLAGS
    + option(8)
    + option(3)
    + option(99, b"x" * 50)
    + option(10, name_and_queries(b"disk", b"base:allocation"))
    + option(6, name_and_infos(b"nope"))
    + option(7, name_and_infos(b"disk", 1, 3))
)


@given(st.lists(st.integers(1, len(SESSION) - 1), unique=True, max_size=20).map(sorted))
def test_any_split_of_the_bytes_gives_the_same_replies(cuts: list[int]) -> None:
    whole = b"".join(event.reply for event in feed(Handshake(DIRECTORY, Policy()), SESSION))
    handshake = Handshake(DIRECTORY, Policy())
    pieces = [SESSION[start:end] for start, end in zip([0, *cuts], [*cuts, len(SESSION)], strict=True)]
    assert b"".join(event.reply for piece in pieces for event in feed(handshake, piece)) == whole


@given(st.binary(max_size=200))
def test_only_handshake_errors_leave_the_parser(junk: bytes) -> None:
    handshake = start()
    with contextlib.suppress(HandshakeError):
        feed(handshake, option(10, junk[:100]) + option(7, junk) + junk)


def test_every_option_of_the_protocol_is_answered() -> None:
    for number in Option:
        handshake = start(tls=TlsMode.ON)
        assert feed(handshake, option(number, b"disk" if number is Option.EXPORT_NAME else b""))


def crowded(count: int) -> FakeDirectory:
    return FakeDirectory(*(FakeOffer(f"disk{number}", description="d" * 100) for number in range(count)))


def test_a_list_is_told_in_slices_of_few_exports() -> None:
    handshake = Handshake(crowded(1000), Policy())
    handshake.receive(FLAGS + option(3) + option(99))
    told = 0
    while told < 1001:
        event = handshake.next_event()
        assert isinstance(event, Send)
        replies = split_option_replies(event.reply)
        assert 1 <= len(replies) <= LIST_SLICE
        assert len(event.reply) <= LIST_SLICE_BYTES + 8192
        told += len(replies)
    assert replies[-1].kind == Reply.ACK
    unsupported = handshake.next_event()
    assert isinstance(unsupported, Send)
    assert split_option_replies(unsupported.reply)[0].kind == Reply.ERR_UNSUP


def test_a_slice_counts_exports_that_are_hidden() -> None:
    """Looking whether a peer is admitted is what takes the time."""

    class Hidden(FakeDirectory):
        def offers(self) -> Iterator[None]:  # type: ignore[override]
            return iter([None] * 1000)

    handshake = Handshake(Hidden(), Policy())
    (*slices, last) = feed(handshake, FLAGS + option(3))
    assert len(slices) >= 1000 // LIST_SLICE
    assert all(event.reply == b"" for event in slices)
    assert [reply.kind for reply in split_option_replies(last.reply)] == [Reply.ACK]


def test_who_was_told_many_exports_may_ask_several_options_of_each() -> None:
    class Shrinking(FakeDirectory):
        lists = 0

        def offers(self) -> tuple[FakeOffer, ...]:
            self.lists += 1
            return self._offers if self.lists == 1 else self._offers[:1]  # most are removed, and can be asked for

    handshake = Handshake(Shrinking(*crowded(100).offers()), Policy(option_limit=8))
    feed(handshake, FLAGS + option(3) * 2)
    for number in range(100):
        for asked in (6, 9, 6):
            assert feed(handshake, option(asked, name_and_infos(f"disk{number}".encode())))
    with pytest.raises(HandshakeError, match=r"more than 808 options"):
        feed(handshake, option(99) * 600)


@pytest.mark.parametrize(("count", "kind"), [(64, Reply.ACK), (65, Reply.ERR_TOO_BIG), (5400, Reply.ERR_TOO_BIG)])
def test_queries_for_contexts_are_few(count: int, kind: Reply) -> None:
    assert ask(structured(), 10, name_and_queries(b"disk", *[b"x:"] * count))[-1].kind == kind


@pytest.mark.parametrize(("count", "kind"), [(1024, Reply.ACK), (1025, Reply.ERR_TOO_BIG)])
def test_information_types_are_few(count: int, kind: Reply) -> None:
    assert ask(start(), 6, name_and_infos(b"disk", *range(count)))[-1].kind == kind
