"""Requests judged and replies built, without I/O."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdzram.nbd.constants import Chunk, Command, CommandFlag, Error, MetaContext, ReplyStyle
from nbdzram.nbd.transmission import error_reply, read_reply, request_at, status_chunk, verdict_on
from nbdzram.nbd.verdicts import Asked, Verdict, error_of, explain
from tests.wire import request

SIZE = 1 << 20
COOKIE = b"cookie12"
SIMPLE, STRUCTURED, EXTENDED = ReplyStyle


def judge(
    command: int,
    offset: int,
    length: int,
    *,
    flags: int = 0,
    style: int = STRUCTURED,
    read_only: bool = False,
    context_count: int = 1,
) -> Verdict:
    parsed = request_at(request(command, offset, length, flags=flags, extended=style == EXTENDED), style)
    assert parsed is not None
    return Verdict(verdict_on(parsed, size=SIZE, style=style, read_only=read_only, context_count=context_count))


def chunks_of(reply: bytes) -> list[tuple[int, int, bytes]]:
    """(flags, kind, payload) of each chunk of a structured or extended reply to COOKIE."""
    chunks = []
    while reply:
        if reply[:4] == b"\x66\x8e\x33\xef":
            flags, kind, cookie, size = struct.unpack(">HH8sI", reply[4:20])
            reply = reply[20:]
        else:
            assert reply[:4] == b"\x6e\x8a\x27\x8c"
            flags, kind, cookie, _, size = struct.unpack(">HH8sQQ", reply[4:32])
            reply = reply[32:]
        assert cookie == COOKIE
        chunks.append((flags, kind, reply[:size]))
        reply = reply[size:]
    return chunks


def test_a_short_request_waits_for_more() -> None:
    assert request_at(request(0, 0, 512)[:-1], SIMPLE) is None


@pytest.mark.parametrize("style", [SIMPLE, EXTENDED])
def test_a_bad_magic_is_told(style: int) -> None:
    with pytest.raises(ValueError, match="magic"):
        request_at(bytes(32), style)


def test_a_payload_follows_write_and_nothing_else_in_compact_requests() -> None:
    for command in range(10):
        parsed = request_at(request(command, 0, 512), SIMPLE)
        assert parsed is not None
        assert parsed[-1] == (512 if command == Command.WRITE else 0)


def test_a_payload_follows_the_flag_and_any_write_in_extended_requests() -> None:
    """QEMU 10 writes without the flag, and its own server takes the payload nevertheless."""
    for flags, payload in ((0, 0), (CommandFlag.PAYLOAD_LEN, 512)):
        for command in range(10):
            parsed = request_at(request(command, 0, 512, flags=flags, extended=True), EXTENDED)
            assert parsed is not None
            assert parsed[-1] == (512 if command == Command.WRITE else payload)


@pytest.mark.parametrize("command", [0, 4, 5, 7])
def test_past_the_end_is_invalid_for_what_does_not_store(command: int) -> None:
    verdict = judge(command, SIZE - 511, 512)
    assert verdict is Verdict.OUT_OF_RANGE
    assert error_of(verdict, command) == Error.EINVAL


@pytest.mark.parametrize("command", [1, 6])
def test_past_the_end_is_no_space_for_what_stores(command: int) -> None:
    verdict = judge(command, SIZE - 511, 512)
    assert verdict is Verdict.OUT_OF_RANGE
    assert error_of(verdict, command) == Error.ENOSPC


@pytest.mark.parametrize(("offset", "length"), [(2**64 - 1, 1), (2**64 - 1, 2**32 - 1), (SIZE + 1, 0)])
def test_ranges_that_overflow_are_past_the_end(offset: int, length: int) -> None:
    assert judge(0, offset, length) is Verdict.OUT_OF_RANGE


@pytest.mark.parametrize("command", [1, 4, 6])
def test_a_read_only_export_refuses_writers(command: int) -> None:
    verdict = judge(command, 0, 512, read_only=True)
    assert error_of(verdict, command) == Error.EPERM


@pytest.mark.parametrize("command", [0, 3, 5, 7])
def test_a_read_only_export_serves_readers(command: int) -> None:
    assert judge(command, 0, 0 if command == 3 else 512, read_only=True) is Verdict.OK


@pytest.mark.parametrize("command", range(8))
def test_fua_is_accepted_on_every_command(command: int) -> None:
    assert judge(command, 0, 0 if command in (2, 3) else 512, flags=CommandFlag.FUA) is Verdict.OK


ALLOWED = {
    Command.READ: CommandFlag.DF,
    Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}


@pytest.mark.parametrize("command", [c for c in Command if c is not Command.DISC])
@pytest.mark.parametrize("bit", range(1, 16))
def test_each_flag_is_accepted_on_its_commands_only(command: Command, bit: int) -> None:
    allowed = bool(ALLOWED.get(command, 0) & 1 << bit)
    verdict = judge(command, 0, 0 if command is Command.FLUSH else 512, flags=1 << bit)
    assert verdict is (Verdict.OK if allowed else Verdict.WRONG_FLAGS)


def test_df_needs_structured_replies() -> None:
    assert judge(0, 0, 512, flags=CommandFlag.DF, style=SIMPLE) is Verdict.WRONG_FLAGS


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA, CommandFlag.PAYLOAD_LEN])
def test_extended_write_is_allowed_with_and_without_its_payload_flag(flags: int) -> None:
    assert judge(1, 0, 512, style=EXTENDED, flags=flags) is Verdict.OK


@pytest.mark.parametrize("command", [8, 9, 0xFFFF])
def test_unknown_commands_are_invalid(command: int) -> None:
    assert error_of(judge(command, 0, 0), command) == Error.EINVAL


def test_unfragmented_reads_are_served_up_to_the_promise_and_refused_above() -> None:
    def df(length: int) -> Verdict:
        parsed = request_at(request(0, 0, length, flags=CommandFlag.DF), STRUCTURED)
        assert parsed is not None
        return Verdict(verdict_on(parsed, size=1 << 30, style=STRUCTURED))

    assert df(65536) is Verdict.OK
    assert df((256 << 10) + 1) is Verdict.FRAGMENTED
    assert error_of(Verdict.FRAGMENTED, Command.READ) == Error.EOVERFLOW


def test_reads_are_served_up_to_the_payload_limit_and_refused_above() -> None:
    def read(length: int) -> Verdict:
        parsed = request_at(request(0, 0, length), STRUCTURED)
        assert parsed is not None
        return Verdict(verdict_on(parsed, size=1 << 30, style=STRUCTURED, payload_limit=1 << 20))

    assert read(1 << 20) is Verdict.OK
    assert read((1 << 20) + 1) is Verdict.TOO_LONG


def test_an_empty_status_request_is_invalid() -> None:
    """A status descriptor may not be empty, so there is nothing to answer with."""
    assert judge(7, 0, 0) is Verdict.WRONG_SHAPE
    assert judge(7, 0, 1) is Verdict.OK


def test_status_without_a_context_is_invalid() -> None:
    assert judge(7, 0, 512, context_count=0) is Verdict.NO_CONTEXT


def test_flush_takes_no_range() -> None:
    assert judge(3, 0, 512) is Verdict.WRONG_SHAPE


def test_every_verdict_has_an_error_and_a_sentence() -> None:
    for verdict in Verdict:
        text = explain(verdict, Asked(Command.READ, 0, COOKIE, 4096, 512), size=SIZE, limit=1024)
        assert text
        assert len(text.encode()) < 4096
        if verdict is not Verdict.OK:
            assert error_of(verdict, Command.READ) in Error


def test_a_simple_read_is_one_header_and_the_content() -> None:
    assert read_reply(SIMPLE, COOKIE, 0, 0, b"x" * 512) == b"\x67\x44\x66\x98" + bytes(4) + COOKIE + b"x" * 512


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_zero_blocks_leave_as_holes(style: int) -> None:
    content = b"a" * 4096 + bytes(8192) + b"b" * 4096
    chunks = chunks_of(read_reply(style, COOKIE, 4096, 4096, content))
    assert [(flags, kind) for flags, kind, _ in chunks] == [
        (0, Chunk.OFFSET_DATA),
        (0, Chunk.OFFSET_HOLE),
        (1, Chunk.OFFSET_DATA),
    ]
    assert chunks[0][2] == struct.pack(">Q", 4096) + b"a" * 4096
    assert chunks[1][2] == struct.pack(">QI", 8192, 8192)
    assert chunks[2][2] == struct.pack(">Q", 16384) + b"b" * 4096


@pytest.mark.parametrize("place", [0, 7, 8, 9, 4000, 4087, 4088, 4095])
def test_one_byte_anywhere_makes_a_block_no_hole(place: int) -> None:
    content = bytes(4096) + bytes(place) + b"x" + bytes(4095 - place)
    chunks = chunks_of(read_reply(STRUCTURED, COOKIE, 0, 0, content))
    assert [(kind, payload[8:]) for _, kind, payload in chunks] == [
        (Chunk.OFFSET_HOLE, struct.pack(">I", 4096)),
        (Chunk.OFFSET_DATA, content[4096:]),
    ]


def test_holes_begin_and_end_where_blocks_of_the_export_do() -> None:
    """A read that begins in the middle of a block is not cut into blocks of its own."""
    content = b"d" * 1096 + bytes(4096) + b"d" * 100
    chunks = chunks_of(read_reply(STRUCTURED, COOKIE, 3000, 3000, content))
    assert [(kind, int.from_bytes(payload[:8])) for _, kind, payload in chunks] == [
        (Chunk.OFFSET_DATA, 3000),
        (Chunk.OFFSET_HOLE, 4096),
        (Chunk.OFFSET_DATA, 8192),
    ]


def test_a_few_zeroes_at_an_end_are_no_hole() -> None:
    """A hole's header would not fit where they lay, and the reply would grow over what follows."""
    chunks = chunks_of(read_reply(STRUCTURED, COOKIE, 4086, 4086, bytes(10) + b"d" * 4096 + bytes(10)))
    assert [(kind, payload[8:]) for _, kind, payload in chunks] == [
        (Chunk.OFFSET_DATA, bytes(10) + b"d" * 4096 + bytes(10))
    ]


def test_df_keeps_a_mixture_in_one_chunk() -> None:
    content = bytes(4096) + b"b" * 4096
    ((_, kind, payload),) = chunks_of(read_reply(STRUCTURED, COOKIE, 0, 0, content, whole=True))
    assert kind == Chunk.OFFSET_DATA
    assert payload[8:] == content


@given(
    st.sampled_from([STRUCTURED, EXTENDED]),
    st.integers(0, 8192),
    st.lists(st.tuples(st.booleans(), st.integers(1, 6000)), min_size=1, max_size=8),
    st.booleans(),
)
def test_chunks_cover_the_read_exactly_once(style: int, offset: int, runs: list[tuple[bool, int]], whole: bool) -> None:
    content = b"".join((b"\0" if zero else b"d") * size for zero, size in runs)
    reply = read_reply(style, COOKIE, offset, offset, content, whole=whole)
    chunks = chunks_of(reply)
    assert [flags for flags, _, _ in chunks] == [0] * (len(chunks) - 1) + [1]
    rebuilt = b""
    for _, kind, payload in chunks:
        assert int.from_bytes(payload[:8]) == offset + len(rebuilt)
        rebuilt += payload[8:] if kind == Chunk.OFFSET_DATA else bytes(int.from_bytes(payload[8:]))
    assert rebuilt == content
    assert len(reply) <= len(content) + 40 + 12
    assert not whole or len(chunks) == 1


def test_status_descriptors_are_narrow_or_wide_with_the_headers() -> None:
    extents = [(4096, 3), (1 << 20, 0)]
    ((flags, kind, payload),) = chunks_of(status_chunk(STRUCTURED, COOKIE, 0, 1, extents, True))
    assert (flags, kind) == (1, Chunk.BLOCK_STATUS)
    assert payload == struct.pack(">IIIII", MetaContext.ALLOCATION, 4096, 3, 1 << 20, 0)
    ((_, kind, payload),) = chunks_of(status_chunk(EXTENDED, COOKIE, 0, 1, extents, True))
    assert kind == Chunk.BLOCK_STATUS_EXT
    assert payload == struct.pack(">IIQQQQ", MetaContext.ALLOCATION, 2, 4096, 3, 1 << 20, 0)


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 0), (512, 512), (SIZE, 0)])
def test_a_flush_is_of_all_of_the_export(offset: int, length: int) -> None:
    """Section "NBD_CMD_FLUSH": offset and length are zero."""
    assert judge(Command.FLUSH, 0, 0) is Verdict.OK
    assert judge(Command.FLUSH, offset, length) is Verdict.WRONG_SHAPE


def test_an_extended_reply_names_the_request_s_offset_and_no_other() -> None:
    """Each kind of chunk, wherever in the request its own content lies (section "Extended reply chunk message")."""
    asked, at = 7 << 40, (7 << 40) + 4096
    replies = (
        read_reply(EXTENDED, COOKIE, asked, at, bytes(8192) + b"d" * 4096),
        read_reply(EXTENDED, COOKIE, asked, at, b"d" * 4096, whole=True),
        status_chunk(EXTENDED, COOKIE, asked, 1, [(4096, 3)], True),
        error_reply(EXTENDED, COOKIE, asked, 5, b"why", at),
        error_reply(EXTENDED, COOKIE, asked, 22, b"why"),
    )
    for reply in replies:
        rest = reply
        while rest:
            offset, size = struct.unpack(">QQ", rest[16:32])
            assert offset == asked
            rest = rest[32 + size :]


def test_errors_carry_their_text_and_offset() -> None:
    ((flags, kind, payload),) = chunks_of(error_reply(STRUCTURED, COOKIE, 0, 5, b"why", 4096))
    assert (flags, kind) == (1, Chunk.ERROR_OFFSET)
    assert payload == struct.pack(">IH", 5, 3) + b"why" + struct.pack(">Q", 4096)
    ((_, kind, payload),) = chunks_of(error_reply(EXTENDED, COOKIE, 0, 22, b"why"))
    assert kind == Chunk.ERROR
    assert payload == struct.pack(">IH", 22, 3) + b"why"
    assert error_reply(SIMPLE, COOKIE, 0, 22, b"why") == struct.pack(">II", 0x67446698, 22) + COOKIE


def test_errors_have_the_values_that_the_protocol_names_which_are_those_of_linux() -> None:
    assert {error.name: error.value for error in Error} == {error.name: getattr(errno, error.name) for error in Error}
