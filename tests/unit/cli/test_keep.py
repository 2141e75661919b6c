"""`attach --persist`: what it tells the kernel, and what it does when connections die. The kernel here is a fake edge.

The kernel's own part is held by tests/kernel, in a Linux guest.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nbdzram.cli import netlink
from nbdzram.cli.greeting import Dialled, Refused, dialler, greet
from nbdzram.cli.hints import Address
from nbdzram.cli.keep import Keeper
from nbdzram.cli.netlink import NetlinkDevice, Patience
from nbdzram.errors import UserError
from nbdzram.nbd.constants import TransmissionFlag
from nbdzram.residence import go_late
from tests.support.pki import Pki
from tests.unit.cli.conftest import Server, run
from tests.wire import (
    CMD_DISC,
    IHAVEOPT,
    NBDMAGIC,
    OPT_GO,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_INFO,
    request,
)

Start = Callable[..., Server]
MIB = 1 << 20
PATIENCE = Patience(request=3, dead=70)
LEAVE = 50  # looks at the device, after which a test that goes wrong ends


class FakeDevice:
    """A device whose connections die when a test says so; it holds what the kernel would."""

    def __init__(self, events: Sequence[Callable[[FakeDevice], bool]] = ()) -> None:
        self.events = iter(events)
        self.held: list[socket.socket] = []
        self.told: list[tuple[str, int, Patience]] = []
        self.there = self.busy = self.named = False
        self.refusal: OSError | None = None
        self.size = 0
        self.looks = 0

    def attached(self) -> bool:
        return self.there

    def connect(self, sockets: Sequence[socket.socket], size_bytes: int, flags: int, patience: Patience) -> None:
        self._may_refuse()
        assert flags & TransmissionFlag.CAN_MULTI_CONN
        self.size, self.there = size_bytes, True
        self._take("connect", sockets, patience)

    def replace(self, sockets: Sequence[socket.socket], patience: Patience) -> None:
        self._may_refuse()
        self._take("replace", sockets, patience)

    def _take(self, what: str, sockets: Sequence[socket.socket], patience: Patience) -> None:
        self.told.append((what, len(sockets), patience))
        self.held += [socket.socket(fileno=os.dup(one.fileno())) for one in sockets]

    def disconnect(self) -> None:
        self._may_refuse()
        self.there = False

    def _may_refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def is_named(self) -> bool:
        return self.named

    def size_bytes(self) -> int:
        return self.size

    def read_only(self) -> bool:
        return False

    def in_use(self) -> bool:
        return self.busy

    def wait(self, seconds: float, *, wake: int) -> bool:
        del seconds, wake
        self.looks += 1
        event = next(self.events, None)
        return event(self) if event is not None else False

    def close(self) -> None:
        for one in self.held:
            one.close()


@pytest.fixture
def reader() -> Iterator[int]:
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def keeper(device: FakeDevice, dial: Callable[[], Dialled], reader: int, said: list[str]) -> Keeper:
    return Keeper(
        device,
        "/dev/nbd0",
        dial,
        connections=2,
        patience=PATIENCE,
        wake=reader,
        told_to_leave=lambda: device.looks > LEAVE,
        say=said.append,
    )


def detached(device: FakeDevice) -> bool:
    device.there = False
    return False


def died(device: FakeDevice) -> bool:
    return device.there


def dial_to(server: Server, export: str = "disk") -> Callable[[], Dialled]:
    return dialler(Address.of(f"nbd+unix:///?socket={server.socket}"), export)


def test_what_the_kernel_is_given_is_in_transmission_and_knows_size_flags_and_both_timeouts(
    start: Start, reader: int
) -> None:
    device = FakeDevice([detached])
    keeping = keeper(device, dial_to(start("-e", "disk=5M")), reader, [])
    keeping.attach()
    assert (device.told, device.size) == ([("connect", 2, PATIENCE)], 5 * MIB)
    assert keeping.keep() is False
    for one in device.held:
        one.sendall(request(CMD_DISC, 0, 0))
        assert one.recv(1) == b"", "it was no client in transmission"
    device.close()


def test_of_several_addresses_the_first_that_is_reached_is_the_server(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ::1 beside 127.0.0.1; and never another from then on, where a second server may have a disk of that size."""
    server = start("-e", "disk=5M", "-i", "127.0.0.1", "-p", "0")
    port = int(next(line for line in server.greeting if "nbd://" in line).rpartition(":")[2])
    found = [socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0] for host in ("127.0.0.3", "127.0.0.1")]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        dial = dialler(Address.of(f"nbd://both:{port}"), "disk")
    first = dial()
    with socket.create_server(("127.0.0.3", port)):  # it comes up late, and would be the first to be asked
        second = dial()
    for one in (first, second):
        assert one.socket.getpeername() == ("127.0.0.1", port)
        one.socket.close()


def test_a_dead_connection_is_replaced_once_a_server_is_there_again(start: Start, reader: int) -> None:
    """As many sockets go along as there may be dead ones; the reason is said once, however long it takes."""
    server = start("-e", "disk=5M")
    dial, said = dial_to(server), list[str]()
    path = server.socket
    hidden = path.with_name("hidden.sock")

    def dies(_: FakeDevice) -> bool:
        path.rename(hidden)
        return True

    def comes_back(_: FakeDevice) -> bool:
        hidden.rename(path)
        return False

    device = FakeDevice([dies, lambda _: False, lambda _: False, comes_back, detached])
    keeping = keeper(device, dial, reader, said)
    keeping.attach()
    keeping.keep()
    assert [what for what, _, _ in device.told] == ["connect", "replace"]
    assert device.told[1] == ("replace", 2, PATIENCE)
    assert [line for line in said if "lost a connection" in line] == [
        "/dev/nbd0 has lost a connection, and its requests wait: No such file or directory"
    ]
    assert "is connected, after" in said[-1]
    device.close()


def test_a_disk_of_another_size_is_never_put_below_what_uses_the_first(start: Start, reader: int) -> None:
    first, second, said = start("-e", "disk=5M"), start("-e", "disk=6M"), list[str]()
    servers = iter([first, first, second, second])
    device = FakeDevice([died, lambda _: False, detached])

    def dial() -> Dialled:
        return dial_to(next(servers))()

    keeping = keeper(device, dial, reader, said)
    keeping.attach()
    keeping.keep()
    assert [what for what, _, _ in device.told] == ["connect"]
    assert f"has {6 * MIB} bytes now and had {5 * MIB}" in said[0]
    device.close()


def test_what_is_written_is_not_put_upon_what_may_be_read_alone(start: Start, reader: int) -> None:
    """An operator says so for a while: writes wait, and fail not. What was read-only from the beginning is attached."""
    server, said = start("-e", "disk=5M", "-e", "fixed=5M,ro"), list[str]()

    def becomes(flag: str) -> Callable[[FakeDevice], bool]:
        def event(device: FakeDevice) -> bool:
            assert server.run("exports", "change", "disk", flag).code == 0
            return device.there

        return event

    device = FakeDevice([becomes("--read-only"), becomes("--no-read-only"), detached])
    keeping = keeper(device, dial_to(server), reader, said)
    keeping.attach()
    keeping.keep()
    assert [what for what, _, _ in device.told] == ["connect", "replace"]
    assert "the export is read-only now, and /dev/nbd0 is written" in said[0]
    fixed = FakeDevice([died, detached])
    keeping = keeper(fixed, dial_to(server, "fixed"), reader, said)
    keeping.attach()
    keeping.keep()
    assert [what for what, _, _ in fixed.told] == ["connect", "replace"]
    for one in (device, fixed):
        one.close()


def test_a_device_that_is_attached_already_is_taken_over_by_its_size(start: Start, reader: int) -> None:
    """After this process, or an initramfs, attached it: with fresh sockets for whatever died meanwhile."""
    server = start("-e", "disk=5M", "-e", "small=4M")
    device, said = FakeDevice([detached]), list[str]()
    device.there, device.size = True, 5 * MIB
    for device.named in (True, False):
        told: list[str] = []
        keeper(device, dial_to(server), reader, told).attach()
        assert ("known by its size alone" in "".join(told)) is not device.named
    assert device.told == [("replace", 2, PATIENCE)] * 2
    device.told.clear()
    device.there, device.looks = True, LEAVE  # its one look more ends it
    keeper(device, dial_to(server, "small"), reader, said).attach()
    assert device.told == []
    assert f"has {4 * MIB} bytes now" in said[2]
    device.close()


def test_told_to_leave_it_detaches_only_what_nobody_uses(start: Start, reader: int) -> None:
    device = FakeDevice()
    device.there = device.busy = True
    keeping = keeper(device, dial_to(start("-e", "disk=5M")), reader, [])
    assert (keeping.leave(), device.there) == (False, True)
    device.busy = False
    assert (keeping.leave(), device.there) == (True, False)


def test_whatever_the_kernel_refuses_is_one_sentence_with_its_reason(start: Start, reader: int) -> None:
    """Also where it does not answer, which has no number."""
    dial = dial_to(start("-e", "disk=5M"))
    for refusal, says in (
        (OSError(errno.EINVAL, "Invalid argument"), "Invalid argument"),
        (TimeoutError("timed out"), "timed out"),
    ):
        device = FakeDevice([died])
        device.refusal = refusal
        keeping = keeper(device, dial, reader, [])
        with pytest.raises(UserError, match=rf"does not attach /dev/nbd0: {says}"):
            keeping.attach()
        device.there, device.size = True, 5 * MIB
        with pytest.raises(UserError, match=rf"takes no new connection for /dev/nbd0: {says}; .*nonetlink"):
            keeping.attach()
        with pytest.raises(UserError, match=rf"does not detach /dev/nbd0: {says}"):
            keeping.leave()


def test_who_is_forestalled_in_detaching_has_detached_it(reader: int) -> None:
    class Gone(FakeDevice):
        def disconnect(self) -> None:
            self.there = False
            raise OSError(errno.EINVAL, "Invalid argument")

    device = Gone()
    device.there = True
    dial = dialler(Address.of("nbd+unix:///?socket=/nowhere"), "disk")
    assert keeper(device, dial, reader, []).leave()


def test_who_is_refused_reads_the_servers_reason(start: Start) -> None:
    with pytest.raises(Refused, match=r"refuses the export 'none': .*none"):
        dial_to(start("-e", "disk=5M"), "none")()


def test_a_server_that_asks_for_tls_is_reached_by_a_tunnel(start: Start, tmp_path: Path) -> None:
    """Whatever the URI says of it."""
    certificate, key = Pki(tmp_path).issue("localhost", file="server", alternatives="DNS:localhost")
    files = ["--tls", "require", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    with pytest.raises(Refused, match=r"the server asks for TLS, .*let a tunnel end on this machine"):
        dial_to(start("-e", "disk=5M", *files))()


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0"])
def test_something_else_that_listens_there_is_refused(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        with pytest.raises(Refused, match="no NBD server of today"):
            greet(ours, "disk")


EXPORT = struct.pack(">HQH", 0, 5 * MIB, 0x105)
OTHERS = [
    struct.pack(">H", 1) + b"ten-lett-s",  # its name: as long as what is told of size and flags
    struct.pack(">H", 2) + b"twelve",
    struct.pack(">HIII", 3, 512, 4096, 32 * MIB),
]


@pytest.mark.parametrize("told", [[EXPORT], [*OTHERS, EXPORT], [EXPORT, *OTHERS]], ids=["alone", "last", "first"])
def test_whatever_else_a_server_tells_size_and_flags_are_what_it_says_of_them(told: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3))
        for body in told:
            theirs.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, OPT_GO, REP_INFO, len(body)) + body)
        theirs.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, OPT_GO, REP_ACK, 0))
        assert greet(ours, "disk") == (5 * MIB, 0x105)


def test_messages_are_as_the_kernel_reads_them() -> None:
    """Held against bytes made by hand: length and type of each attribute, its padding, and what nests."""
    assert netlink.attribute(2, b"nbd\0") == bytes.fromhex("0800 0200 6e626400")
    assert netlink.attribute(9, b"abcde") == bytes.fromhex("0900 0900 6162636465 000000")
    made = netlink.message(16, 3, netlink.attribute(2, b"nbd\0"))
    assert made == bytes.fromhex("1c000000 1000 0500 00000000 00000000 03 01 0000 0800 0200 6e626400")
    with socket.socket() as one, socket.socket() as two:
        told = netlink._sockets([one, two])
        numbers = struct.pack("=I", one.fileno()), struct.pack("=I", two.fileno())
    assert told == b"".join(
        [bytes.fromhex("1c00 0700"), *(bytes.fromhex("0c00 0100 0800 0100") + number for number in numbers)]
    )
    assert list(netlink.attributes(told[4:])) == [(1, bytes.fromhex("0800 0100") + number) for number in numbers]


def test_the_kernel_is_told_of_both_timeouts_whenever_it_is_given_sockets() -> None:
    """The one of a dead connection is 0 until it is told, and then nothing waits."""
    device = NetlinkDevice.__new__(NetlinkDevice)
    ours, device._kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device._family, device._index, device._block_size, device._backend = 30, 7, 512, b"here\0"
    with ours, device._kernel:
        for _ in range(2):
            ours.send(struct.pack("=IHHII i", 36, 2, 0, 0, 0, 0) + bytes(16))  # done
        device.connect([ours], 5 * MIB, 0x12, PATIENCE)
        device.replace([ours], PATIENCE)
        told = [ours.recv(4096), ours.recv(4096)]
    connect, replace = (dict(netlink.attributes(one[20:])) for one in told)
    assert [one[16] for one in told] == [netlink.Command.CONNECT, netlink.Command.RECONFIGURE]
    numbers = {2: 5 * MIB, 3: 512, 4: PATIENCE.request, 5: 0x12, 8: PATIENCE.dead}
    assert {kind: struct.unpack("=Q", connect[kind])[0] for kind in numbers} == numbers
    assert {kind: struct.unpack("=Q", replace[kind])[0] for kind in (4, 8)} == {4: 3, 8: 70}
    for one in (connect, replace):
        assert (one[1], one[10], len(one[7])) == (struct.pack("=I", 7), b"here\0", 12)


def test_the_kernels_own_answers_are_read() -> None:
    """The family of families is everywhere; one that is not there is its errno."""
    with netlink._generic() as kernel:
        answer = netlink.exchange(kernel, 16, 3, netlink.attribute(2, b"nlctrl\0"))
        told = dict(netlink.attributes(answer[20:]))
        assert told[1] == struct.pack("=H", 16)
        with pytest.raises(FileNotFoundError):
            netlink.exchange(kernel, 16, 3, netlink.attribute(2, b"no-such-family\0"))


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has the module")
def test_a_kernel_without_the_client_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"over netlink .*modprobe nbd"):
        NetlinkDevice("/dev/nbd0", "nbd://192.0.2.1/disk", 4096)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--uri", "nbd://192.0.2.1", "--nbdtab", "--persist"], "--persist goes not with --nbdtab"),
        (["--uri", "nbd://192.0.2.1", "--dead-timeout", "5"], "are for --persist"),
        (["--uri", "nbds://192.0.2.1", "--persist"], "which the kernel does not speak"),
        (["--uri", "nbds://192.0.2.1", "--persist"], "let a tunnel end on this machine instead"),
        (["--uri", "nbd://192.0.2.1", "--persist", "--tls-certificates", "/"], "let a tunnel end on this machine"),
        (["--uri", "nbd://192.0.2.1", "--persist", "--request-timeout", "0"], "request-timeout"),
    ],
)
def test_what_cannot_be_kept_is_refused(words: list[str], says: str) -> None:
    done = run("attach", "disk", *words)
    assert done.code in {1, 2}
    assert says in done.err


def test_the_oom_score_is_only_lowered(tmp_path: Path) -> None:
    file = tmp_path / "oom_score_adj"
    for before, after in (("0\n", "-900"), ("-1000\n", "-1000\n")):
        file.write_text(before)
        assert list(go_late(file)) == []
        assert file.read_text() == after
    (refusal,) = go_late(tmp_path / "absent" / "oom_score_adj")
    assert "OOMScoreAdjust=-900" in str(refusal)
