"""Disks go from pool to pool as streams: whole, folded, verified, or not at all."""

from __future__ import annotations

import io
import mmap
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from typing_extensions import Buffer

from nbdzram.engine import moment
from nbdzram.engine.absorb import Absorber
from nbdzram.engine.arena import allocations_left, fail_allocation
from nbdzram.engine.check import Check
from nbdzram.engine.codec import digest_of
from nbdzram.engine.disk import Disk, Extent
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.walk import Told, Walk
from nbdzram.errors import PoolFull, StreamCut, StreamError, UserError
from nbdzram.stream import layout
from nbdzram.stream.receiving import Intake, Place, Receiver
from nbdzram.stream.sending import Progress
from tests.support.arena import Arena
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text
from tests.unit.engine.test_verify import rotten
from tests.unit.stream import plain_reader
from tests.unit.stream.roads import (
    receive,
    receiver_in,
    receiver_in_pools,
    revealed,
    sent,
    sent_from_pools,
    whole,
)

MIB = 1 << 20
LEAF = 2 * MIB
WORD = struct.pack("<Q", 0x0123456789ABCDEF)


def motley(pool: Pool, name: str = "disk", *, size: int = 3 * LEAF + 700) -> Disk:
    """A disk with each kind of block, in several leaves, with holes between and an end within a block."""
    disk = pool.create(name, size)
    disk.write(0, b"".join([text(1), noise(2), half_random(3), bytes(BLOCK), b"8 bytes!" * 512, WORD * 512, text(1)]))
    disk.write(LEAF - 3 * BLOCK, b"".join(half_random(number, 1000) for number in range(6)))
    disk.write(2 * LEAF + 100, b"not a whole block")
    disk.write(size - 700, b"e" * 700)
    return disk


def kinds(disk: Disk) -> list[tuple[int, int]]:
    return disk.extents(0, disk.size_bytes, 1 << 16, Extent.HOLE | Extent.SAME_FILLED | Extent.HUGE)


# -- whole disks -----------------------------------------------------------------------------------------------------


def test_a_disk_arrives_as_it_was_sent_block_by_block_and_kind_by_kind(pool: Pool, other: Pool) -> None:
    disk = motley(pool)
    arrived = revealed(other, sent(disk))["disk"]
    assert whole(arrived) == whole(disk)
    assert kinds(arrived) == kinds(disk)
    assert (arrived.size_bytes, arrived.read_only) == (disk.size_bytes, False)
    assert len(other.all_disks()) == 1


def test_a_reader_that_was_written_from_the_reference_alone_reads_it(pool: Pool) -> None:
    disks = [motley(pool), pool.create("empty", 12345)]
    for number in range(400):
        disks[0].write((600 + number) * BLOCK, prose(number))
    run(Recompress(pool, dictionary=True))
    disks.append(pool.clone(disks[0], "clone"))
    disks[2].write(BLOCK, noise(77))
    found = plain_reader.contents(sent(*disks, origins={"clone": 0}))
    assert found == {disk.name: whole(disk) for disk in disks}


def test_what_is_written_after_the_moment_is_not_in_the_stream(pool: Pool, other: Pool) -> None:
    disk = motley(pool)
    before = whole(disk)
    stream = sent(disk, meanwhile=lambda: disk.write(0, noise(99) + text(98)))
    assert whole(revealed(other, stream)["disk"]) == before


def test_progress_says_how_much_of_a_disk_is_told(pool: Pool) -> None:
    disk = pool.create("disk", 8 * MIB)
    disk.write(0, b"".join(noise(number) for number in range(2048)))
    progress, shares = Progress(), [0.0]

    class Watched(io.BytesIO):
        def write(self, content: Buffer) -> int:
            shares.append(progress.share)
            return super().write(content)

    sent(disk, progress=progress, out=Watched())
    assert shares == sorted(shares)
    assert len({round(share, 2) for share in shares}) > 4
    assert shares[-1] == 1.0


def test_an_object_is_sent_once_however_many_blocks_and_disks_hold_it(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", MIB)
    for number in range(256):
        disk.write(number * BLOCK, half_random(number % 8))
    run(Fold(pool))
    disks = [disk, *(pool.clone(disk, f"clone{number}") for number in range(9))]
    progress = Progress()
    stream = sent(*disks, progress=progress)
    assert (progress.objects, progress.exports, progress.blocks) == (8, 10, 2560)
    assert progress.object_bytes == pool.stats().compr_data_size
    assert {name: whole(arrived) for name, arrived in revealed(other, stream).items()} == {
        copy.name: whole(disk) for copy in disks
    }
    assert other.stats().objects == 8


def test_a_clone_shares_its_table_with_its_origin_where_it_arrives(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", 8 * LEAF)
    for leaf in range(8):
        disk.write(leaf * LEAF, half_random(leaf) + text(leaf))
    clone = pool.clone(disk, "clone")
    clone.write(3 * LEAF, noise(5))
    clone.trim(5 * LEAF, LEAF)
    alone, both = len(sent(disk)), len(sent(disk, clone, origins={"clone": 0}))
    assert both - alone < 2 * BLOCK  # one object, a trim and two records
    arrived = revealed(other, sent(disk, clone, origins={"clone": 0}))
    assert whole(arrived["clone"]) == whole(clone)
    assert whole(arrived["disk"]) == whole(disk)
    assert other.stats().metadata <= pool.stats().metadata + 4 * BLOCK


def test_what_folds_while_it_is_sent_arrives_right(pool: Pool) -> None:
    """Handles that were told become forwards, and the objects of others take their place."""
    disk = pool.create("disk", 4 * LEAF)
    content = [half_random(number % 37, 600) for number in range(2048)]
    disk.write(0, b"".join(content))
    copies = moment.snapshot_together([disk], ["\ncopy"])
    told = Told()
    walk, fold = Walk(copies[0], None, told), Fold(pool)
    steps = []
    while (step := walk.step()) is not None:
        steps.append(step)
        fold.step(64)
    assert len(steps) > 2
    moment.discard(copies)
    with Pool() as target:
        absorber = Absorber(target)
        staging = moment.prepare(target, "\nstaging", BLOCK << 32)
        arrived = moment.prepare(target, "arrived", disk.size_bytes)
        for first, _, _, objects, runs in steps:
            absorber.take_objects(staging, objects)
            absorber.take_blocks(arrived, staging, first, runs)
        moment.discard([staging])
        assert whole(arrived) == b"".join(content)
        target.check()


def test_it_folds_into_what_is_there(pool: Pool, other: Pool) -> None:
    disk = motley(pool)
    revealed(other, sent(disk), prefix="first-")
    before, intake = other.stats(), Intake()
    stream = sent(disk)
    for received in receive(other, stream, prefix="second-", intake=intake):
        moment.finish(received.disk)
        moment.reveal(received.disk)
    assert other.stats().objects == before.objects
    assert other.stats().compr_data_size == before.compr_data_size
    assert intake.objects_folded == intake.objects > 0


def test_an_object_that_is_there_counts_once_however_often_room_was_looked_for(other: Pool) -> None:
    disk = other.create("disk", LEAF)
    disk.write(0, b"".join(half_random(number, 1500) for number in range(512)))
    for number in range(1, 512):
        disk.trim(number * BLOCK, BLOCK)  # gaps: a write that finds no room makes some
    content = half_random(0, 1500)
    staging, absorber = moment.prepare(other, "\nstaging", MIB), Absorber(other)
    fail_allocation(0)
    absorber.take_objects(staging, struct.pack("<IHBBQ", 0, BLOCK, 1, 0, digest_of(content, 0)) + content)
    assert allocations_left() < 0  # there was none
    assert (absorber.objects, absorber.objects_folded) == (1, 1)


def test_maintenance_goes_on_while_a_stream_arrives(pool: Pool, other: Pool) -> None:
    """What has come is held by block tables, so that a check counts it and a fold or compaction may move it."""
    disk = pool.create("disk", 4 * LEAF)
    disk.write(0, b"".join(half_random(number % 700, 900) for number in range(2000)))
    source, turns = io.BytesIO(sent(disk)), 0

    def read(count: int) -> bytes:
        nonlocal turns
        turns += 1
        if turns % 8 == 0:
            run(Fold(other))
            run(Recompress(other, level=1))
            run(Compact(other))
            run(Check(other))
            other.check()
        return source.read(min(count, 100_000))

    receiver = Receiver(lambda name: Place(name, other, lambda _: None), lambda told: told.name)
    (received,) = receiver.receive(read)
    assert turns > 16
    assert whole(received.disk) == whole(disk)


def test_private_disks_stay_apart_where_they_arrive(pool: Pool, other: Pool) -> None:
    open_disk, tenant = pool.create("open", MIB), pool.create("tenant", MIB, private=True)
    for disk in (open_disk, tenant):
        disk.write(0, half_random(1))
    clone = pool.clone(tenant, "clone")
    stream = sent(open_disk, tenant, clone, domains={"tenant": 7, "clone": 7})
    arrived = revealed(other, stream)
    assert [arrived[name].private for name in ("open", "tenant", "clone")] == [False, True, True]
    assert other.stats().objects == 2  # tenant and its clone share one
    run(Fold(other))
    assert other.stats().objects == 2


def test_what_did_not_change_takes_no_place_beside_its_own(pool: Pool, other: Pool) -> None:
    """Where each export is private, and has a folding domain of its own."""
    names = [f"tenant{number}" for number in range(8)]
    tenants = [pool.create(name, MIB, private=True) for name in names]
    for number, disk in enumerate(tenants):
        disk.write(0, half_random(number))
    domains = {name: 1 + number for number, name in enumerate(names)}
    bases = {disk.name: pool.clone(disk, f"{disk.name}@monday", read_only=True) for disk in tenants}
    for number, base in enumerate(bases.values()):
        base.identify(1 + number)
        revealed(other, sent(base, domains={base.name: 1}))
    tenants[0].write(BLOCK, half_random(9))
    stream = sent(*tenants, bases=bases, domains=domains)
    receiver = receiver_in(other)
    with pytest.raises(StreamCut):
        receiver.receive(io.BytesIO(stream[:-1]).read, keep=True)
    assert len(other.all_disks()) == 2 * len(tenants) + 1
    receiver.discard()
    arrived = revealed(other, stream)
    assert [whole(arrived[disk.name]) for disk in tenants] == [whole(disk) for disk in tenants]
    assert len({disk.domain for disk in arrived.values()}) == len(tenants)


def test_a_dictionary_comes_along_and_is_kept_or_its_objects_are_encoded_again(pool: Pool, other: Pool) -> None:
    disk = pool.create("disk", LEAF)
    disk.write(0, b"".join(prose(number) for number in range(400)))
    run(Recompress(pool, dictionary=True))
    assert pool.stats().compr_by_codec["zstd-dict"] > 0
    stream = sent(disk)
    assert whole(revealed(other, stream)["disk"]) == whole(disk)
    assert other.stats().compr_by_codec == pool.stats().compr_by_codec
    revealed(other, stream, prefix="again-")
    run(Check(other))
    with Pool() as crowded:
        for seed in range(4):  # it has a dictionary in each place
            filler = crowded.create(f"filler{seed}", LEAF)
            filler.write(0, b"".join(prose(number) for number in range(1000 * seed, 1000 * seed + 300)))
            run(Recompress(crowded, dictionary=True))
            filler.write(0, bytes(LEAF))
        intake = Intake()
        receive(crowded, stream, intake=intake)
        arrived = next(found for found in crowded.all_disks() if found.name == "disk")
        assert whole(arrived) == whole(disk)
        crowded.check()


def test_each_pool_of_a_stream_has_its_own_dictionaries(pool: Pool, other: Pool) -> None:
    with Pool() as second, Pool() as target:
        disks = [made.create(name, LEAF) for made, name in ((pool, "first"), (second, "second"))]
        for start, disk in enumerate(disks):
            disk.write(0, b"".join(prose(number) for number in range(1000 * start, 1000 * start + 300)))
            run(Recompress(disk.pool, dictionary=True))
            assert disk.pool.stats().compr_by_codec["zstd-dict"] > 0
        arrived = receiver_in_pools(other, target).receive(io.BytesIO(sent_from_pools(*disks)).read)
        assert [whole(received.disk) for received in arrived] == [whole(disk) for disk in disks]
        assert other.stats().compr_by_codec == pool.stats().compr_by_codec
        assert target.stats().compr_by_codec == second.stats().compr_by_codec


# -- what changed ----------------------------------------------------------------------------------------------------


def snapshot(disk: Disk, name: str) -> Disk:
    copy = disk.pool.clone(disk, name, read_only=True)
    copy.identify(moment.new_identity())
    return copy


def test_since_a_snapshot_only_what_changed_is_sent(pool: Pool, other: Pool) -> None:
    disk = motley(pool, size=16 * LEAF)
    monday = snapshot(disk, "monday")
    revealed(other, sent(monday))
    disk.write(0, noise(50))
    disk.write(9 * LEAF, half_random(51, 900) * 2)
    disk.trim(2 * BLOCK, BLOCK)
    disk.write(4 * BLOCK, WORD * 512)
    disk.write(BLOCK, noise(2))  # what is there already
    disk.resize(17 * LEAF + 5)
    tuesday = snapshot(disk, "tuesday")
    progress = Progress()
    stream = sent(tuesday, bases={"tuesday": monday}, progress=progress)
    assert progress.blocks == 5
    assert progress.objects == 3  # the noise, and one that no fold has met yet twice
    arrived = revealed(other, stream)["tuesday"]
    assert whole(arrived) == whole(tuesday)
    assert kinds(arrived) == kinds(tuesday)
    assert arrived.identity == tuesday.identity != 0
    identities = {monday.identity: whole(monday)}
    assert plain_reader.contents(stream, identities) == {"tuesday": whole(tuesday)}


def test_what_changed_in_a_private_disk_comes_to_its_folding_domain(pool: Pool, other: Pool) -> None:
    disk = pool.create("tenant", MIB, private=True)
    disk.write(0, half_random(1))
    monday = snapshot(disk, "monday")
    revealed(other, sent(monday, domains={"monday": 7}))
    disk.write(BLOCK, half_random(2))
    tuesday = snapshot(disk, "tuesday")
    arrived = revealed(other, sent(tuesday, bases={"tuesday": monday}, domains={"tuesday": 7}))["tuesday"]
    assert (arrived.private, whole(arrived)) == (True, whole(tuesday))
    assert other.stats().objects == 2


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, LEAF, LEAF + 100])
def test_a_disk_that_shrank_since_arrives_shrunk(pool: Pool, other: Pool, size: int) -> None:
    disk = motley(pool)
    monday = snapshot(disk, "monday")
    revealed(other, sent(monday))
    disk.resize(size)
    tuesday = snapshot(disk, "tuesday")
    arrived = revealed(other, sent(tuesday, bases={"tuesday": monday}))["tuesday"]
    assert whole(arrived) == whole(tuesday)
    arrived.resize(3 * LEAF)
    assert arrived.read(size, 3 * LEAF - size) == bytes(3 * LEAF - size)


def test_a_base_that_is_changed_while_it_is_copied_is_none(pool: Pool, other: Pool) -> None:
    """Between being found by its identity and the copy; whoever changes it takes that away first."""
    disk = pool.create("disk", MIB)
    disk.write(0, noise(1))
    base = pool.clone(disk, "disk@monday", read_only=True)
    base.identify(5)
    (arrived,) = revealed(other, sent(base)).values()
    disk.write(BLOCK, noise(2))

    def find_base(_: object) -> Disk:
        arrived.identify(0)
        arrived.trim(0, MIB)
        return arrived

    receiver = Receiver(lambda name: Place(name, other, find_base), lambda told: told.name)
    with pytest.raises(StreamError, match=r"told, 'disk@monday' where it was sent, is being changed"):
        receiver.receive(io.BytesIO(sent(disk, bases={"disk": base})).read)
    assert other.all_disks() == [arrived]


def test_a_receiver_without_the_base_says_so_and_shows_nothing(pool: Pool, other: Pool) -> None:
    disk = motley(pool)
    monday = snapshot(disk, "monday")
    stream = sent(snapshot(disk, "tuesday"), bases={"tuesday": monday})
    revealed(other, sent(motley(pool, "unlike")))
    with pytest.raises(StreamError, match="what changed in 'tuesday' since 'monday', and the pool 'default' has no"):
        receive(other, stream)
    assert [found.name for found in other.all_disks()] == ["unlike"]


def test_an_increment_takes_time_in_proportion_to_what_changed(pool: Pool) -> None:
    """Counted in nodes: what both lead to is passed over, so a thousand leaves more are no step more."""
    disk = pool.create("disk", 512 * LEAF)
    for leaf in range(512):
        disk.write(leaf * LEAF, text(leaf))
    monday = snapshot(disk, "monday")
    disk.write(300 * LEAF, noise(1))
    progress = Progress()
    stream = sent(snapshot(disk, "tuesday"), bases={"tuesday": monday}, progress=progress)
    assert progress.blocks == 1
    assert len(stream) < 2 * BLOCK


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [half_random(1), noise(1)], ids=["lz4", "raw"])
def test_rot_is_never_sent(tmp_path: Path, content: bytes) -> None:
    out = io.BytesIO()
    with rotten(tmp_path / "arena", content) as pool:
        (disk,) = pool.disks()
        before = pool.stats().blocks_rotten
        with pytest.raises(StreamError, match="the export 'disk' cannot be sent: block 0 is not what was written"):
            sent(disk, out=out)
        assert pool.all_disks() == [disk]
        assert pool.stats().blocks_rotten == before + 1
    with pytest.raises(StreamError, match="the stream ends in the middle"):
        receive(Pool(), out.getvalue())


@pytest.mark.parametrize("level", [0, 1, 3])
def test_a_disk_whose_table_is_damaged_is_not_sent(tmp_path: Path, level: int) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 << 20)
        disk.write(0, half_random(1))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            place = arena.word_at(0, level)
            arena.set_word(place, arena.word(place) ^ 1 << 35)
            with pytest.raises(StreamError, match="the export 'disk' cannot be sent: block 0 is not what was written"):
                sent(disk)
            arena.set_word(place, arena.word(place) ^ 1 << 35)
        pool.check()


def test_a_stream_that_is_cut_anywhere_shows_nothing(pool: Pool, other: Pool) -> None:
    stream = sent(motley(pool))
    rolls = random.Random(5)
    places = {*range(40), *rolls.sample(range(len(stream)), 60), *range(len(stream) - 40, len(stream))}
    for place in sorted(places):
        with pytest.raises(StreamError):
            receive(other, stream[:place])
        assert other.all_disks() == []
    with pytest.raises(StreamError, match="bytes behind its end record"):
        receive(other, stream + b"\0")
    assert other.all_disks() == []
    assert other.stats().objects == 0


def test_no_flipped_bit_lets_a_wrong_byte_arrive(pool: Pool, other: Pool) -> None:
    """Each is refused: nothing in a stream goes unchecked."""
    stream = sent(motley(pool))
    rolls = random.Random(6)
    for turn in range(2000):
        place = turn if turn < 400 else rolls.randrange(len(stream))
        bent = bytearray(stream)
        bent[place] ^= 1 << rolls.randrange(8)
        with pytest.raises(StreamError):
            receive(other, bytes(bent))
        assert other.all_disks() == [], (turn, place)
    assert other.stats().objects == 0


def test_what_this_program_does_not_know_is_refused_in_a_sentence(pool: Pool, other: Pool) -> None:
    stream = sent(motley(pool))
    for place, value, says in (
        (0, b"X", "this is no nbdzram stream"),
        (8, b"\2", "the stream has version 2, this program reads 1"),
        (12, b"\4", r"features that this program does not know \(bits 0x4\)"),
    ):
        with pytest.raises(StreamError, match=says):
            receive(other, stream[:place] + value + stream[place + 1 :])
    framed, _ = layout.record(0, 9, b"")  # type: ignore[arg-type]
    with pytest.raises(StreamError, match="of kind 9, which this program does not know"):
        receive(other, layout.preamble() + framed)


def forged(*records: tuple[int, bytes]) -> bytes:
    """A stream of these records, with the right checksums; an end record has no count of records and no digest yet."""
    out, digest = io.BytesIO(), 0
    out.write(layout.preamble())
    for number, (kind, body) in enumerate(records):
        if kind == layout.Kind.END:
            framed, checksum = layout.record(number, layout.Kind.END, body, struct.pack("<QQ", number, digest))
        else:
            framed, checksum = layout.record(number, layout.Kind(kind), body)
        out.write(framed)
        digest = layout.digest_on(digest, checksum)
    return out.getvalue()


HEADER = layout.header_body(layout.Header(bytes(16), 0, 1, 1, "forger"))
POOL = layout.pool_body(layout.PoolPart(0, "default"))
EXPORT_PART = layout.ExportPart(
    number=0, name="disk", size_bytes=MIB, read_only=False, domain=0, identity=0, origin=layout.Origin.HOLES,
    origin_number=0, origin_name="", description="", admits_nobody=False, addresses=(), certificates=(),
)  # fmt: skip
EXPORT = layout.export_body(EXPORT_PART)
OBJECT = struct.pack("<IHBBQ", 5, BLOCK, 1, 0, xxhash.xxh3_64_intdigest(noise(1), seed=0)) + noise(1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([(5, struct.pack("<I", 0) + OBJECT[:-1])], "a record ends in the middle of what begins with byte 0"),
        ([(5, struct.pack("<I", 0) + OBJECT[:6] + b"\2" + OBJECT[7:])], "object 5 is not the content that was sent"),
        (
            [(5, struct.pack("<I", 0) + OBJECT[:6] + b"\5" + OBJECT[7:])],
            "object 5 is encoded in a way that there is not",
        ),
        ([(5, struct.pack("<I", 0) + OBJECT[:-1] + b"!")], "object 5 is not the content that was sent"),
        ([(5, struct.pack("<I", 1) + OBJECT)], "objects that no export may have"),
        ([(6, struct.pack("<IIQHHI", 0, 0, 0, 3, 1, 6))], "a block names object 6, which has not come"),
        ([(6, struct.pack("<IIQHH", 0, 0, 0, 4, 1))], "a run of blocks is of kind 4"),
        ([(6, struct.pack("<IIQHH", 0, 0, 255, 1, 2))], "block 255 lies behind the end"),
        ([(6, struct.pack("<IIQHH", 0, 0, 1 << 63, 1, 2))], "lies behind the end"),
        ([(6, struct.pack("<IIQHH", 0, 0, 0, 3, 2))], "a record ends in the middle"),
        ([(6, struct.pack("<IIQHH", 1, 0, 0, 1, 2))], "blocks of an export 1"),
        ([(4, struct.pack("<I", 4) + b"content")], "there is no dictionary 4"),
        ([(2, layout.pool_body(layout.PoolPart(5, "default")))], "a pool is missing"),
        ([(3, EXPORT)], "an export is missing"),
        (
            [(7, struct.pack("<IIQQQ", 2, 0, 0, 0, 0))],
            "1 exports, 0 objects and 0 blocks came, and 2, 0 and 0",
        ),
        (
            [(7, struct.pack("<IIQQQ", 1, 0, 1, 0, 0))],
            "1 exports, 0 objects and 0 blocks came, and 1, 1 and 0",
        ),
        ([(1, HEADER)], "its header is not its first record"),
    ],
)
def test_a_forged_stream_is_refused_whatever_its_checksums_say(
    other: Pool, body: list[tuple[int, bytes]], says: str
) -> None:
    end = (7, struct.pack("<IIQQQ", 1, 0, 0, 0, 0))
    with pytest.raises(StreamError, match=says):
        receive(other, forged((1, HEADER), (2, POOL), (3, EXPORT), *body, *[end] * (body[-1][0] != end[0])))
    assert other.all_disks() == []
    right = forged((1, HEADER), (2, POOL), (3, EXPORT), end)
    assert [received.name for received in receive(other, right)] == ["disk"]


def test_exports_that_the_header_counts_have_to_come(other: Pool) -> None:
    header = layout.header_body(layout.Header(bytes(16), 0, 1, 2, "forger"))
    with pytest.raises(StreamError, match="the stream is damaged"):
        receive(other, forged((1, header), (2, POOL), (3, EXPORT), (7, struct.pack("<IIQQQ", 1, 0, 0, 0, 0))))
    assert other.all_disks() == []


def test_only_what_nobody_can_write_has_the_identity_of_what_was_sent(other: Pool) -> None:
    identity = 7 << 40
    for read_only, expected in ((True, identity), (False, 0)):
        export = layout.export_body(replace(EXPORT_PART, read_only=read_only, identity=identity))
        stream = forged((1, HEADER), (2, POOL), (3, export), (7, struct.pack("<IIQQQ", 1, 0, 0, 0, 0)))
        (received,) = receive(other, stream)
        assert received.disk.identity == expected
        moment.discard([received.disk])


def test_a_stream_that_does_not_fit_leaves_the_pool_as_it_was(pool: Pool) -> None:
    disk = pool.create("disk", LEAF)
    disk.write(0, b"".join(noise(number) for number in range(256)))
    stream = sent(disk)
    with Pool(mem_limit=MIB // 2) as small:
        small.create("kept", MIB).write(0, text(1))
        before = small.stats()
        with pytest.raises(StreamError, match="the stream does not fit: the pool is at its limit of 524288 bytes"):
            receive(small, stream)
        assert [found.name for found in small.all_disks()] == ["kept"]
        assert small.stats().objects == before.objects
        small.check()


def test_a_pool_without_a_limit_is_never_said_to_be_at_it(pool: Pool) -> None:
    """`receive` said "at its limit of 0 bytes" where a file system was full; nor is memory one that has no name."""
    disk = pool.create("disk", MIB)
    disk.write(0, b"".join(noise(number) for number in range(64)))
    stream = sent(disk)
    lacks = "memory is exhausted, or the file system of the state directory is full; free some of it, "
    told = set()
    with Pool() as other:
        written = other.create("written", MIB)
        try:
            for granted in range(3):
                fail_allocation(granted)
                with pytest.raises(UserError) as refused:
                    receive(other, stream)
                told.add(str(refused.value))
            fail_allocation(0)
            with pytest.raises(PoolFull, match=f"of export 'written': {lacks}trim"):
                written.write(0, noise(1))
        finally:
            fail_allocation(-1)
    assert any(f"the stream does not fit: {lacks}remove exports, fold or compact" in one for one in told)
    assert not any("limit of 0" in one or "None" in one for one in told)
    assert any(one.endswith("memory is exhausted; free some of it, or remove an export") for one in told)


def test_what_a_stream_says_behind_the_end_of_a_disk_is_none_of_it(other: Pool) -> None:
    export = EXPORT.replace(struct.pack("<Q", MIB), struct.pack("<Q", 100))
    blocks = (6, struct.pack("<IIQHHI", 0, 0, 0, 3, 1, 5))
    end = (7, struct.pack("<IIQQQ", 1, 0, 1, BLOCK, 1))
    stream = forged((1, HEADER), (2, POOL), (3, export), (5, struct.pack("<I", 0) + OBJECT), blocks, end)
    disk = revealed(other, stream)["disk"]
    disk.resize(BLOCK)
    assert disk.read(0, BLOCK) == noise(1)[:100].ljust(BLOCK, b"\0")


def test_a_run_of_one_word_may_cross_from_leaf_to_leaf(other: Pool) -> None:
    export = layout.export_body(replace(EXPORT_PART, size_bytes=3 * LEAF))
    first, count = LEAF // BLOCK - 1, LEAF // BLOCK + 2
    blocks = (6, struct.pack("<IIQHH", 0, 0, first, 2, count) + WORD)
    end = (7, struct.pack("<IIQQQ", 1, 0, 0, 0, count))
    disk = revealed(other, forged((1, HEADER), (2, POOL), (3, export), blocks, end))["disk"]
    assert whole(disk) == bytes(first * BLOCK) + WORD * (count * BLOCK // 8) + bytes(3 * LEAF - (first + count) * BLOCK)
    assert other.stats().same_pages == count


def test_a_base_without_identity_is_none(other: Pool) -> None:
    """A disk that may change has identity 0, and so has nothing in common with another of 0."""
    other.create("any", MIB)
    export = EXPORT.replace(struct.pack("<IQ", 0, MIB), struct.pack("<IQ", 2, MIB))
    with pytest.raises(StreamError, match="no read-only disk with that content"):
        receive(other, forged((1, HEADER), (2, POOL), (3, export)))


def test_blocks_take_no_objects_of_another_folding_domain(other: Pool) -> None:
    absorber = Absorber(other)
    staging = moment.prepare(other, "\nstaging", BLOCK << 32)
    absorber.take_objects(staging, OBJECT)
    tenant = moment.prepare(other, "tenant", MIB, private=True)
    with pytest.raises(StreamError, match="of two folding domains"):
        absorber.take_blocks(tenant, staging, 0, struct.pack("<HHI", 3, 1, 5))
