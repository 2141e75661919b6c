"""Clients that mean harm: they cost bounded memory and descriptors, and nobody else notices.

Each test runs a real server with its default limits (but shorter deadlines), does something nasty with many
connections, and asks three things: how far did the server grow, was somebody else served meanwhile, and is everything
given back when the crowd is gone.
"""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest

from tests.faults.crowd import (
    LONG,
    MIB,
    SETTLE_SECONDS,
    STORED,
    Crowd,
    Watch,
    drain,
    drip,
    expect_others_are_served,
    half_a_write,
    reads,
)
from tests.support.nbd_client import Client, RefusedOption, open_socket
from tests.support.server import Nbdzram
from tests.wire import (
    CMD_READ,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    REP_ERR_INVALID,
    REP_ERR_UNKNOWN,
    client_hello,
    name_and_infos,
    option,
    request,
)

HELLO = client_hello()
UNSUPPORTED = bytes(20) + b"option 1000 is not supported"


@pytest.mark.parametrize(
    ("count", "length", "tcp"),
    [(1, LONG, False), (30, LONG, False), (30, LONG, True), (300, MIB, False), (300, 60_000, True)],
)
def test_reads_that_are_never_read_back(target: Nbdzram, crowd: Crowd, count: int, length: int, tcp: bool) -> None:
    """64 reads in flight on each of `count` connections, and nobody takes a reply."""
    watch = Watch(target)
    crowd.attach(target, count, tcp=tcp)
    crowd.press([reads(64, length)] * count)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_what_nobody_takes_is_forgotten_soon_after_the_server_ended(impatient: Nbdzram, crowd: Crowd) -> None:
    """By itself the system keeps it for minutes, as memory that is no process's."""
    watch = Watch(impatient)
    crowd.attach(impatient, 10, tcp=True)
    crowd.press([reads(64, MIB)] * 10)
    impatient.wait_until(lambda: watch.unread > 0, SETTLE_SECONDS)  # what was asked for may not be answered yet
    impatient.stop()
    deadline = time.monotonic() + SETTLE_SECONDS
    while watch.unread:
        assert time.monotonic() < deadline, f"{watch.unread} bytes are still kept"
        time.sleep(0.1)


@pytest.mark.parametrize("length", [LONG, pytest.param(MIB, marks=pytest.mark.slow), 60_000])
def test_writes_that_stop_half_way(target: Nbdzram, crowd: Crowd, length: int) -> None:
    """64 clients announce `length` bytes for places of their own, send half of them, and wait."""
    watch = Watch(target)
    crowd.attach(target, 64)
    content = random.Random(7).randbytes(length // 32 or length // 2)
    crowd.press([half_a_write(64 * MIB + n * (length // 4), length, content) for n in range(64)])
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_left()
    with target.client() as witness:
        witness.trim(64 * MIB, 900 * MIB)
    watch.expect_recovered()


def test_a_large_write_waits_for_its_turn_and_gets_it(target: Nbdzram, crowd: Crowd) -> None:
    """A crowd that stopped half-way is cut one by one when somebody else needs its place."""
    crowd.attach(target, 3)
    crowd.press([half_a_write(64 * MIB, LONG, STORED)] * 3)
    with target.client() as other:
        other.write(128 * MIB, STORED * 20)
        assert other.read(128 * MIB + 19 * MIB, MIB) == STORED
    assert "wait for room" in target.log


def test_a_reset_with_replies_outstanding(target: Nbdzram, crowd: Crowd) -> None:
    """The connection breaks by RST while 64 long reads are on their way, again and again."""
    watch = Watch(target)
    for _ in range(10):
        crowd.attach(target, 4, tcp=True)
        crowd.press([reads(64, LONG)] * 4)
        crowd.disperse(reset=True)
    expect_others_are_served(target)
    watch.expect_modest()
    watch.expect_recovered()


def test_silence_ends_with_the_handshake_deadline(impatient: Nbdzram, crowd: Crowd) -> None:
    """After the connect, after the flags, in the middle of an option's header, of its data: all are cut in time."""
    go = option(OPT_GO, size=100)
    beginnings = [b"", HELLO[:2], HELLO, HELLO + go[:9], HELLO + go + bytes(50)]
    crowd.connect(impatient, 4 * len(beginnings))
    for member, said in zip(crowd.members, beginnings * 4, strict=True):
        member.sendall(said)
    for member in crowd.members:
        drain(member)
    with impatient.client() as other:
        assert other.read(0, 512) == bytes(512)


def test_a_byte_a_time_does_not_extend_the_deadline(impatient: Nbdzram) -> None:
    """The deadline is for the whole handshake: whoever drips bytes is cut in the middle of them."""
    with open_socket(impatient.unix_path) as slow:
        slow.settimeout(0.01)
        dripped = HELLO + option(OPT_GO, bytes(4000))
        assert not all(drip(slow, dripped[at : at + 1]) for at in range(len(dripped)))


def test_requests_that_come_a_byte_a_time_are_served_like_others(target: Nbdzram) -> None:
    """Dripping is slow, not wrong, in the transmission phase."""
    with target.client() as slow:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for byte in request(CMD_READ, 0, 512, cookie=7):
            slow.socket.sendall(bytes([byte]))
        assert slow.reply() == (0, 7)
        assert slow.receive(512) == STORED[:512]


def test_silence_in_the_middle_of_a_request_harms_nobody(target: Nbdzram, crowd: Crowd) -> None:
    """200 clients stop in the middle of a header: a disk may be quiet for days, so they stay, and stay small."""
    watch = Watch(target)
    crowd.attach(target, 200)
    crowd.press([[request(CMD_READ, 0, 512)[:13]]] * 200)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_a_hang_up_after_each_byte_of_a_handshake(target: Nbdzram) -> None:
    """Wherever the handshake breaks off, the next client is served and no descriptor stays behind."""
    said = HELLO + option(OPT_STRUCTURED_REPLY) + option(OPT_LIST) + option(OPT_GO, name_and_infos(b"disk", 3))
    watch = Watch(target)
    for cut in range(len(said) + 1):
        with open_socket(target.unix_path) as client:
            client.sendall(said[:cut])
    expect_others_are_served(target)
    watch.expect_modest()
    watch.expect_recovered()


def test_a_thousand_options_end_the_connection(target: Nbdzram) -> None:
    """More options than any client needs: the session ends, by a documented limit."""
    client = Client(target.unix_path, None)
    client.socket.sendall(b"".join(option(number, bytes(10)) for number in range(1000, 2000)))
    answered = drain(client.socket) // len(UNSUPPORTED)
    assert 16 <= answered < 1000
    client.close()
    expect_others_are_served(target)


def test_a_thousand_options_at_once_that_nobody_reads(target: Nbdzram, crowd: Crowd) -> None:
    """The replies to pipelined options are not piled up for a client that does not take them."""
    watch = Watch(target)
    crowd.connect(target, 100)
    listing = option(OPT_LIST)
    crowd.press([[HELLO, listing * 1000]] * 100)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


@pytest.mark.parametrize("number", [OPT_GO, OPT_INFO, OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT])
def test_a_name_of_4_gib_is_counted_past_and_not_stored(target: Nbdzram, crowd: Crowd, number: int) -> None:
    """Its announced length allocates nothing, and its bytes are dropped as they come."""
    watch = Watch(target)
    crowd.connect(target, 8)
    flood = bytes(MIB)
    crowd.press([[HELLO, option(number, size=0xFFFFFFFF), *[flood] * 16]] * 8)
    expect_others_are_served(target)
    watch.expect_modest()


def test_names_that_lie_about_their_length(target: Nbdzram) -> None:
    """A name longer than its option is REP_ERR_INVALID, and haggling goes on."""
    client = Client(target.unix_path, None)
    for size in (0xFFFFFFFF, 5, 4097):
        client.send_option(OPT_GO, struct.pack(">I", size) + b"disk" + struct.pack(">H", 0))
        assert client.option_reply(OPT_GO)[0] == REP_ERR_INVALID
    client.go("disk")
    client.close()


@pytest.mark.parametrize(("size", "reply"), [(3000, REP_ERR_UNKNOWN), (4096, REP_ERR_UNKNOWN), (4097, REP_ERR_INVALID)])
def test_long_names_get_an_answer_of_legal_length(target: Nbdzram, size: int, reply: int) -> None:
    """4096 bytes are legal and unknown; one more is not legal. The error's text is at most 4096 bytes."""
    client = Client(target.unix_path, None)
    for character in ("x", "\N{SNOWMAN}"):
        raw = (character * size).encode()[: size - size % len(character.encode())]
        with pytest.raises(RefusedOption) as refusal:
            client.go(raw.decode())
        assert refusal.value.reply == reply or len(raw) < size
        assert len(str(refusal.value).encode()) < 4200
    client.go("disk")
    client.close()


def test_a_name_too_long_for_export_name_ends_the_session(target: Nbdzram) -> None:
    client = Client(target.unix_path, None)
    client.send_option(OPT_EXPORT_NAME, b"x" * 4097)
    with pytest.raises((EOFError, ConnectionResetError)):
        client.receive(1)
    client.close()


def test_a_thousand_connections(target: Nbdzram, crowd: Crowd) -> None:
    """Attached and idle, they stay small; all are served; the next beyond the limit is turned away."""
    watch = Watch(target)
    crowd.attach(target, 1000)
    for member in crowd.members:
        member.sendall(request(CMD_READ, 0, 4096, cookie=9))
    for member in crowd.members:
        member.settimeout(30)
        received = b""
        while len(received) < 16 + 4096:
            received += member.recv(16 + 4096 - len(received))
        assert received[16:] == STORED[:4096]
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_a_thousand_connections_that_never_read(target: Nbdzram, crowd: Crowd) -> None:
    """The worst of both: everybody asks for 64 times 1 MiB and takes nothing."""
    watch = Watch(target)
    crowd.attach(target, 1000)
    crowd.press([reads(64, MIB)] * 1000)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()


def test_the_server_is_shut_down_while_clients_misbehave(impatient: Nbdzram, crowd: Crowd) -> None:
    """SIGTERM ends it in bounded time with exit code 0, whoever is attached and does not read."""
    target = impatient
    with target.client() as client:
        client.write(0, STORED)
    crowd.attach(target, 20)
    crowd.press([reads(64, LONG)] * 10 + [half_a_write(64 * MIB, LONG, STORED)] * 10)
    silent = [open_socket(target.unix_path) for _ in range(10)]
    target.stop()  # asserts exit code 0, within its time, without a traceback
    for guest in silent:
        guest.close()


def test_abort_is_acknowledged_even_in_front_of_a_flood(target: Nbdzram) -> None:
    """ABORT with data that never comes: acknowledged, then closed."""
    client = Client(target.unix_path, None)
    client.socket.sendall(option(OPT_ABORT, size=0xFFFFFFFF))
    assert client.option_reply(OPT_ABORT) == (1, b"")
    with pytest.raises((EOFError, ConnectionResetError)):
        client.receive(1)
    client.close()
