"""A stream that broke goes on behind its last whole record: what arrives is what would have, nothing is sent twice."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import StreamCut, StreamError
from nbdzram.stream import layout
from nbdzram.stream.marks import Marks
from nbdzram.stream.position import Position, continuation, read_identity, read_token
from nbdzram.stream.reading import opening
from nbdzram.stream.receiving import Receiver
from nbdzram.stream.sending import Progress, Sending
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text
from tests.unit.stream import plain_reader
from tests.unit.stream.roads import begun, receiver_in, whole
from tests.unit.stream.test_streams import EXPORT, HEADER, OBJECT, POOL, forged

LEAF = 512 * BLOCK
HEAD_BYTES = 56  # of a continuation


def family(pool: Pool) -> list[Disk]:
    """Two disks and a clone, with objects that they share, a dictionary and each kind of block; in some records."""
    disk = pool.create("disk", 3 * LEAF + 700)
    disk.write(0, b"".join([text(1), noise(2), half_random(3), bytes(BLOCK), b"8 bytes!" * 512]))
    disk.write(LEAF, b"".join(prose(number) for number in range(40)))
    run(Recompress(pool, dictionary=True))
    disk.write(2 * LEAF, half_random(9, 300))
    second = pool.create("second", LEAF)
    second.write(8 * BLOCK, noise(2) + text(7) + half_random(3))
    run(Fold(pool))
    clone = pool.clone(disk, "clone")
    clone.write(BLOCK, noise(5))
    clone.trim(LEAF, 4 * BLOCK)
    return [disk, second, clone]


def boundaries(stream: bytes) -> list[int]:
    """Where each record ends."""
    ends, at = [], 16
    while at < len(stream):
        at += 16 + struct.unpack("<I", stream[at : at + 4])[0]
        ends.append(at)
    return ends


def rest_of(sending: Sending, position: Position, progress: Progress | None = None) -> bytes:
    out = io.BytesIO()
    sending.go_back(position, progress or Progress())
    sending.write_to(out.write)  # type: ignore[arg-type]
    return out.getvalue()


def cut(receiver: Receiver, stream: bytes, *, begun: bool = False) -> Position:
    """What came is kept, as far as it goes."""
    source = io.BytesIO(stream)
    if begun:
        opening(source.read)
    with pytest.raises(StreamCut):
        receiver.receive(source.read, keep=True, begun=begun)
    return receiver.position


def finished(receiver: Receiver, rest: bytes) -> dict[str, bytes]:
    """It goes on; what it holds, and then nothing of it stays."""
    source = io.BytesIO(rest)
    assert opening(source.read) == receiver.position
    received = receiver.receive(source.read, begun=True)
    held = {one.name: whole(one.disk) for one in received}
    receiver.discard()
    return held


def test_a_stream_that_says_what_exports_may_take_is_for_readers_who_know_of_it(pool: Pool, other: Pool) -> None:
    """Who does not would offer them without. All others are as they always were; what goes on says the same."""
    disks, limits = (pool.create("bound", LEAF), pool.create("free", LEAF)), Bounds(quota_bytes=BLOCK, iops_burst=3)
    cases: list[tuple[dict[str, Bounds], int]] = [({}, 0), ({"bound": limits}, layout.BOUNDED)]
    for bounds, features in cases:
        with begun(*disks, bounds=bounds, marks=Marks()) as sending:
            out = io.BytesIO()
            sending.write_to(out.write)  # type: ignore[arg-type]
            stream = out.getvalue()
            end, digest = plain_reader.whole_records(stream, 2)
            rest = rest_of(sending, Position(sending.identity, 2, digest))
        assert [int.from_bytes(part[12:16], "little") for part in (stream, rest)] == [features] * 2
        assert plain_reader.joined(stream[:end], rest) == stream
        receiver = receiver_in(other)
        told = {one.name: one.part.bounds for one in receiver.receive(io.BytesIO(stream).read)}
        assert told == {"bound": bounds.get("bound", UNBOUND), "free": UNBOUND}
        receiver.discard()


def test_cut_behind_any_record_it_goes_on_and_is_what_it_was(pool: Pool, other: Pool) -> None:
    disks = family(pool)
    wanted = {disk.name: whole(disk) for disk in disks}
    with begun(*disks, origins={"clone": 0}, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        stream = out.getvalue()
        ends = boundaries(stream)
        assert len(ends) > 8
        for number, end in enumerate(ends[:-1]):
            receiver = receiver_in(other)
            assert cut(receiver, stream[:end]).records == number + 1
            assert other.disks() == []  # nothing shows before the end
            rest = rest_of(sending, receiver.position)
            assert len(rest) - HEAD_BYTES == len(stream) - end, "not a byte twice"
            assert plain_reader.contents(plain_reader.joined(stream[:end], rest)) == wanted
            assert finished(receiver, rest) == wanted
            assert other.stats().objects == 0


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), again=st.floats(0, 1))
def test_cut_anywhere_and_cut_again_it_is_what_it_was(place: float, again: float) -> None:
    with Pool() as pool, Pool() as other:
        disks = family(pool)
        wanted = {disk.name: whole(disk) for disk in disks}
        with begun(*disks, origins={"clone": 0}, marks=Marks()) as sending:
            out = io.BytesIO()
            sending.write_to(out.write)  # type: ignore[arg-type]
            stream = out.getvalue()
            first = stream[: max(int(place * len(stream)), boundaries(stream)[0])]
            if len(first) == len(stream):
                return
            receiver = receiver_in(other)
            second = rest_of(sending, cut(receiver, first))
            second = second[: HEAD_BYTES + int(again * (len(second) - HEAD_BYTES - 1))]
            third = rest_of(sending, cut(receiver, second, begun=True))
            assert plain_reader.contents(plain_reader.joined(first, second, third)) == wanted
            assert finished(receiver, third) == wanted
            other.check()


@pytest.mark.slow
def test_cut_behind_each_byte_it_goes_on(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", LEAF)
    disk.write(0, text(1) + half_random(2) + b"8 bytes!" * 512 + text(1))
    with begun(disk, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        stream = out.getvalue()
        for end in range(boundaries(stream)[0], len(stream)):
            receiver = receiver_in(other)
            rest = rest_of(sending, cut(receiver, stream[:end]))
            assert finished(receiver, rest) == {"disk": whole(disk)}, end


def test_a_bent_record_is_cut_off_and_sent_again(pool: Pool, other: Pool) -> None:
    disks = family(pool)
    with begun(*disks, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        bent = bytearray(out.getvalue())
        end = boundaries(bytes(bent))[4]
        bent[end - 20] ^= 4
        receiver = receiver_in(other)
        assert cut(receiver, bytes(bent)).records == 4
        assert finished(receiver, rest_of(sending, receiver.position)) == {disk.name: whole(disk) for disk in disks}


@pytest.mark.parametrize("behind", [b"\0", b"NBDZRAMC" + bytes(4096)], ids=["a byte", "another stream"])
def test_bytes_behind_the_end_of_what_goes_on_leave_what_came(pool: Pool, other: Pool, behind: bytes) -> None:
    """As any damage does: all but the end was whole, and the end alone is sent again."""
    disks = family(pool)
    with begun(*disks, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        stream = out.getvalue()
        receiver = receiver_in(other)
        rest = rest_of(sending, cut(receiver, stream[: boundaries(stream)[3]]))
        assert cut(receiver, rest + behind, begun=True).records == len(boundaries(stream)) - 1
        assert finished(receiver, rest_of(sending, receiver.position)) == {disk.name: whole(disk) for disk in disks}


def test_a_pipe_that_breaks_while_it_is_written_loses_nothing(pool: Pool, other: Pool) -> None:
    """At any write, in the middle of it or when all of it has gone; who reads has what was written until then."""
    disks = family(pool)
    wanted = {disk.name: whole(disk) for disk in disks}
    for share in (0.5, 1.0):
        breaks_at = breaks(disks, other, wanted, share)
        assert breaks_at > 8


def ends_whole(stream: bytes) -> bool:
    at = boundaries(stream)
    return stream[([16, *at])[-2] + 4] == plain_reader.END


def breaks(disks: list[Disk], other: Pool, wanted: dict[str, bytes], share: float) -> int:
    """At each write in turn, behind that share of it; how many there were."""
    breaks_at = 0
    while True:
        with begun(*disks, origins={"clone": 0}, marks=Marks()) as sending:
            came, writes = io.BytesIO(), 0

            def write(content: bytes, came: io.BytesIO = came, breaks_at: int = breaks_at) -> None:
                nonlocal writes
                writes += 1
                if writes > breaks_at + 2:  # the preamble and the header come
                    came.write(content[: int(len(content) * share)])
                    raise StreamCut("nobody reads")
                came.write(content)

            try:
                sending.write_to(write)
            except StreamCut:
                receiver = receiver_in(other)
                if share == 1 and ends_whole(came.getvalue()):
                    return breaks_at + 1  # it broke behind its last byte
                position = cut(receiver, came.getvalue())
                assert finished(receiver, rest_of(sending, position)) == wanted
                breaks_at += 1
            else:
                return breaks_at


def test_cut_off_between_its_end_and_the_end_mark_it_goes_on(pool: Pool, other: Pool) -> None:
    """Nobody knows yet that nothing follows: its end record comes again."""
    disks = family(pool)
    with begun(*disks, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        source = io.BytesIO(out.getvalue())

        def read(count: int) -> bytes:
            part = source.read(count)
            if not part:
                raise StreamCut("cut off")
            return part

        receiver = receiver_in(other)
        with pytest.raises(StreamCut):
            receiver.receive(read, keep=True)
        assert other.disks() == []
        assert finished(receiver, rest_of(sending, receiver.position)) == {disk.name: whole(disk) for disk in disks}


def test_what_was_refused_is_not_kept(other: Pool) -> None:
    """Only what was cut off is: of a record that says what cannot be, half may have been taken."""
    stream = forged((1, HEADER), (2, POOL), (3, EXPORT), (5, struct.pack("<I", 0) + OBJECT[:-1] + b"!"))
    receiver = receiver_in(other)
    with pytest.raises(StreamError, match="object 5 is not the content that was sent"):
        receiver.receive(io.BytesIO(stream).read, keep=True)
    assert (other.all_disks(), other.stats().objects) == ([], 0)


def test_what_is_written_and_folded_meanwhile_changes_nothing(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", 4 * LEAF)
    content = b"".join(half_random(number % 700, 900) for number in range(2000))
    disk.write(0, content)
    with begun(disk, marks=Marks()) as sending:
        parts: list[bytes] = []

        def write(piece: bytes) -> None:
            if sum(map(len, parts)) > 600_000:
                raise StreamCut("nobody reads")
            parts.append(piece)

        with pytest.raises(StreamCut):
            sending.write_to(write)
        first = b"".join(parts)
        run(Fold(pool))
        disk.write(0, noise(1) * 1000)
        run(Recompress(pool, level=1))
        run(Compact(pool))
        for back in (2, 4, 6):  # records that were on their way
            receiver = receiver_in(other)
            position = cut(receiver, first[: boundaries(first)[-back]])
            progress = Progress()
            rest = rest_of(sending, position, progress)
            assert finished(receiver, rest)["disk"][: len(content)] == content
            assert plain_reader.contents(plain_reader.joined(first, rest))["disk"][: len(content)] == content
            assert progress.bytes_written == len(rest)


def test_marks_are_bounded_and_what_is_older_is_refused(pool: Pool) -> None:
    disk = pool.create("disk", 8 * LEAF)
    for number in range(512):
        disk.write(number * BLOCK, noise(number))
    with begun(disk, marks=Marks(limit_bytes=2000)) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        stream = out.getvalue()
        last = len(boundaries(stream)) - 1
        _, digest = plain_reader.whole_records(stream, 3)
        with pytest.raises(StreamError, match=rf"cannot go on behind its record 3: of what was sent 2K are remembered, "
                           rf"which reach from record \d+ to {last}; send it anew"):  # fmt: skip
            sending.go_back(Position(sending.identity, 3, digest), Progress())
        end, digest = plain_reader.whole_records(stream, last)
        assert rest_of(sending, Position(sending.identity, last, digest))[HEAD_BYTES:] == stream[end:]


def test_a_token_of_other_records_is_refused(pool: Pool) -> None:
    with begun(*family(pool), marks=Marks()) as sending:
        sending.write_to(lambda _: None)
        before = sending.position
        with pytest.raises(StreamError, match="its first 3 records are others than those that were sent"):
            sending.go_back(Position(sending.identity, 3, 77), Progress())
        assert sending.position == before
        with pytest.raises(StreamError, match="cannot go on behind its record 99999"):
            sending.go_back(Position(sending.identity, 99999, 77), Progress())


def test_a_continuation_alone_is_no_stream(pool: Pool, other: Pool) -> None:
    with begun(*family(pool), marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        receiver = receiver_in(other)
        rest = rest_of(sending, cut(receiver, out.getvalue()[:-1]))
        receiver.discard()
    with pytest.raises(StreamError, match="this goes on with a stream that was interrupted"):
        receiver_in(other).receive(io.BytesIO(rest).read)
    for place in (8, 12, 20, 33, 41, 49):
        bent = bytearray(rest)
        bent[place] ^= 1
        with pytest.raises(StreamError, match=r"damaged|version|features"):
            opening(io.BytesIO(bytes(bent)).read)


def test_what_is_not_kept_leaves_nothing(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", LEAF)
    disk.write(0, noise(1))
    with begun(disk) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
    with pytest.raises(StreamCut):
        receiver_in(other).receive(io.BytesIO(out.getvalue()[:-1]).read)
    assert (other.all_disks(), other.stats().objects) == ([], 0)
    receiver = receiver_in(other)
    cut(receiver, out.getvalue()[:-1])
    assert other.stats().objects == 1
    receiver.discard()
    assert (other.all_disks(), other.stats().objects) == ([], 0)


def test_a_token_says_where_and_a_mistyped_one_is_refused() -> None:
    position = Position(bytes(range(16)), 17, 0xABC)
    assert position.token == "000102030405060708090a0b0c0d0e0f-17-0000000000000abc"
    for pasted in (position.token, f"  {position.token}\n"):
        assert read_token(pasted) == position
    assert read_identity(position.token) == read_identity(position.token[:32]) == position.identity
    assert len(continuation(position)) == HEAD_BYTES
    for wrong in ("", "17", position.token[1:], position.token + "0", position.token.replace("-", "_")):
        with pytest.raises(StreamError, match="is no token"):
            read_token(wrong)
    with pytest.raises(StreamError, match="names no stream"):
        read_identity("xyz")


def test_copies_that_are_gone_end_what_would_go_on(pool: Pool) -> None:
    disk = pool.create("disk", LEAF)
    disk.write(0, noise(1))
    with begun(disk, marks=Marks()) as sending:
        out = io.BytesIO()
        sending.write_to(out.write)  # type: ignore[arg-type]
        _, digest = plain_reader.whole_records(out.getvalue(), 2)
    assert moment.concealed(pool) == []
    with pytest.raises(StreamError, match="cannot be sent"):
        rest_of(sending, Position(sending.identity, 3, plain_reader.whole_records(out.getvalue(), 3)[1]))
    assert digest


def test_a_pipe_that_breaks_at_a_dictionary_tells_its_objects_later(pool: Pool, other: Pool) -> None:
    """They were looked at, and stand in no record yet."""
    disk = pool.create("disk", LEAF)
    disk.write(0, b"".join(prose(number) for number in range(400)))
    run(Recompress(pool, dictionary=True))
    assert pool.stats().compr_by_codec["zstd-dict"] > 0
    with begun(disk, marks=Marks()) as sending:
        came = io.BytesIO()

        def write(content: bytes) -> None:
            if content[4] == plain_reader.DICTIONARY and came.tell() > 16:
                raise StreamCut("nobody reads")
            came.write(content)

        with pytest.raises(StreamCut):
            sending.write_to(write)
        receiver = receiver_in(other)
        position = cut(receiver, came.getvalue())
        assert finished(receiver, rest_of(sending, position)) == {"disk": whole(disk)}


@pytest.mark.parametrize("begun", [True, False], ids=["received", "restored"])
def test_however_little_comes_is_told_for_what_it_is(other: Pool, begun: bool) -> None:
    """A file that is no stream was called one that was cut off, if it had fewer bytes than a stream begins with."""

    def refused(content: bytes) -> StreamError:
        source = io.BytesIO(content)
        with pytest.raises(StreamError) as error:
            if begun:
                opening(source.read)
            receiver_in(other).receive(source.read, begun=begun)
        return error.value

    for little in (b"x", b"hello\n", b"NBDZRAMX", layout.MAGIC[1:], bytes(15)):
        assert "this is no nbdzram stream" in str(refused(little))
    assert "the stream is empty" in str(refused(b""))
    for cut in (b"N", layout.MAGIC, layout.preamble()[:15], continuation(Position(bytes(16), 1, 1))[:15]):
        assert isinstance(refused(cut), StreamCut)
