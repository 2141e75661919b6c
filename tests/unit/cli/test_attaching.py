"""What `attach` does to this machine, and says: with programs, a kernel and a device that are made up of files."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdzram.cli import attach, keep, netlink
from nbdzram.cli.diagnosis import Kernel
from nbdzram.cli.hints import Address, Attachment
from nbdzram.cli.main import run
from nbdzram.cli.netlink import Command, NetlinkDevice
from nbdzram.errors import UserError
from tests.unit.cli.conftest import Done

ABSENT, LOADABLE, LOADED = "absent", "loadable", "loaded"
FAR, SECURE = "nbd://192.0.2.10", "nbds://192.0.2.10"


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """run_here("attach", "disk"): in this process, of which a test changes what it finds."""

    def act(*words: str) -> Done:
        code = run(list(words))
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return act


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Kernel]:
    """kernel(LOADABLE): the one that `attach` finds here."""

    def make(state: str) -> Kernel:
        modules = tmp_path / "modules"
        (modules / "kernel/drivers/block").mkdir(parents=True, exist_ok=True)
        if state == LOADABLE:
            (modules / "kernel/drivers/block/nbd.ko").touch()
        if state == LOADED:
            (tmp_path / "nbd").mkdir(exist_ok=True)
        made = Kernel(tmp_path / "nbd", modules)
        monkeypatch.setattr(attach, "Kernel", lambda: made)
        return made

    return make


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """program("modprobe", "exit 1"): a shell's, which notes its arguments in the file that is returned."""
    place = tmp_path / "programs"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place))

    def make(name: str, does: str = "") -> Path:
        noted = place / f"{name}.noted"
        (place / name).write_text(f'#!/bin/sh\necho "$@" >> {noted}\n{does}\n')
        (place / name).chmod(0o755)
        return noted

    return make


@pytest.mark.parametrize(
    ("uri", "swap", "directory", "state", "client", "user", "told"),
    [
        (FAR, False, None, LOADED, True, 0, []),
        (FAR, True, None, LOADED, True, 0, []),
        (SECURE, False, None, LOADED, True, 0, [attach.NO_DIRECTORY]),
        (
            SECURE,
            True,
            Path("/d"),
            LOADED,
            True,
            0,
            ["swap over TLS can lock the machine up: nbd-client(8), TLS SUPPORT"],
        ),
        (FAR, False, None, LOADED, False, 0, ["nbd-client is missing: apt-get install nbd-client"]),
        (FAR, False, None, LOADABLE, True, 0, ["the kernel module nbd is not loaded: modprobe nbd"]),
        (FAR, False, None, ABSENT, True, 0, [attach.NO_MODULE]),
        (FAR, False, None, LOADED, True, 1, ["attaching needs root"]),
    ],
)
def test_what_a_printed_line_still_needs_is_told(
    *,
    kernel: Callable[[str], Kernel],
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    swap: bool,
    directory: Path | None,
    state: str,
    client: bool,
    user: int,
    told: list[str],
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/nbd-client" if client else None)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    attachment = Attachment(Address.of(uri), "disk", swap=swap)
    assert attach.missing(attachment, directory, kernel(state)) == told


@pytest.mark.parametrize(
    ("state", "does", "device", "words"),
    [
        (ABSENT, "", False, attach.NO_MODULE),
        (ABSENT, "", True, None),
        (LOADED, "", True, None),
        (LOADED, "", False, "/dev/nbd7 is not a block device; the module nbd makes /dev/nbd0 to /dev/nbd15"),
        (LOADABLE, "", True, None),
        (LOADABLE, "echo one >&2; echo two >&2; exit 1", True, "cannot load the kernel module nbd: two"),
        (LOADABLE, "echo one; exit 1", True, "cannot load the kernel module nbd: one"),
        (LOADABLE, "exit 3", True, "cannot load the kernel module nbd: exit code 3"),
    ],
)
def test_the_module_is_loaded_where_that_is_needed_and_a_device_is_one(
    *,
    kernel: Callable[[str], Kernel],
    program: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    does: str,
    device: bool,
    words: str | None,
) -> None:
    kernel(state)
    noted = program("modprobe", does)
    monkeypatch.setattr(Path, "is_block_device", lambda _: device)
    if words is None:
        attach._make_device("/dev/nbd7")
    else:
        with pytest.raises(UserError) as refused:
            attach._make_device("/dev/nbd7")
        assert str(refused.value) == words
    assert noted.exists() == (state == LOADABLE)


def test_a_program_that_is_missing_or_cannot_be_run_is_told(program: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"cannot do it: modprobe is missing; apt-get install nbd-client kmod"):
        attach._call(["modprobe"], "do it")
    (program("modprobe").parent / "modprobe").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"cannot do it: modprobe cannot be run: Exec format error; .*--reinstall"):
        attach._call(["modprobe"], "do it")


def test_a_line_is_run_by_root_alone(
    kernel: Callable[[str], Kernel],
    program: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    run_here: Callable[..., Done],
) -> None:
    kernel(LOADED)
    noted = program("nbd-client")
    monkeypatch.setattr(Path, "is_block_device", lambda _: True)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    words = ("attach", "my disk", "nbd7", "--uri", FAR, "--run")
    refused = run_here(*words)
    line = "nbd-client 192.0.2.10 10809 /dev/nbd7 -name 'my disk'"
    assert (refused.code, refused.err) == (1, f"nbdzram: attaching needs root; run it with sudo: {line}\n")
    assert not noted.exists()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    done = run_here(*words)
    told = "attached my disk to /dev/nbd7; detach it with: nbd-client -d /dev/nbd7\n"
    assert (done.code, done.out) == (0, told)
    assert noted.read_text() == "192.0.2.10 10809 /dev/nbd7 -name my disk\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--uri", "nbd+vsock://2"), "nbd-client speaks no vsock; let the server listen on TCP or a unix socket too"),
        (("--uri", SECURE, "--run"), f"the server at {SECURE}:10809/disk asks for TLS; give --tls-certificates DIR"),
        (("--uri", SECURE, "--persist"), f"the server at {SECURE}:10809/disk asks for TLS, which the kernel does not"),
        (("--persist", "--nbdtab"), "--persist goes not with --nbdtab"),
        (("--persist", "--tls-certificates", "/d"), "--persist goes not with --tls-certificates"),
        *[
            ((flag, "3"), "are for --persist; nbd-client has its own")
            for flag in ("--request-timeout", "--dead-timeout")
        ],
        (("--block-size", "512"), "are for --persist; nbd-client has its own"),
    ],
)
def test_what_does_not_go_together_is_refused(run_here: Callable[..., Done], words: tuple[str, ...], told: str) -> None:
    done = run_here("attach", "disk", *(words if "--uri" in words else (*words, "--uri", FAR)))
    assert done.code in (1, 2)
    assert told in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("attached", "kept", "left", "last"),
    [
        (True, False, False, "/dev/nbd7 was detached"),
        (False, True, True, "detached /dev/nbd7"),
        (True, True, False, "/dev/nbd7 is in use and stays attached; run this again"),
    ],
)
def test_who_persists_is_told_what_was_done_and_how_it_ended(
    *,
    run_here: Callable[..., Done],
    kernel: Callable[[str], Kernel],
    monkeypatch: pytest.MonkeyPatch,
    attached: bool,
    kept: bool,
    left: bool,
    last: str,
) -> None:
    made: list[Any] = []

    class Keeper:
        def __init__(self, *given: Any, **named: Any) -> None:
            made.append((given, named))

        def attach(self) -> bool:
            return attached

        def keep(self) -> bool:
            return kept

        def leave(self) -> bool:
            return left

    class Device:
        def __init__(self, *given: Any) -> None:
            made.append(given)

    kernel(LOADED)
    monkeypatch.setattr(Path, "is_block_device", lambda _: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(keep, "Keeper", Keeper)
    monkeypatch.setattr(netlink, "NetlinkDevice", Device)
    monkeypatch.setattr("nbdzram.residence.stay", lambda: ["memory is not locked"])
    done = run_here(
        *("attach", "disk", "nbd7", "--uri", FAR, "--persist", "-C", "3", "--block-size", "4096"),
        *("--request-timeout", "5", "--dead-timeout", "7"),
    )
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    did = "attached disk to /dev/nbd7" if attached else "looking after /dev/nbd7"
    assert "memory is not locked; else a swap or root disk on /dev/nbd7 may wait for this process" in lines[0]
    assert f"{did}; without a server requests wait 7 s" in lines[1]
    assert "detach it with: nbd-client -d /dev/nbd7" in lines[2]
    assert last in lines[3]
    device, ((_, name, _, connections, patience), _) = made
    assert device == ("/dev/nbd7", f"{FAR}:10809/disk", 4096)
    assert (name, connections, patience.request, patience.dead) == ("/dev/nbd7", 3, 5, 7)


# -- the device, as the kernel tells of it ---------------------------------------------------------------------------


class Noting:
    """A socket that notes which of its options are set."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.options: list[tuple[int, ...]] = []

    def setsockopt(self, *option: int) -> None:
        self.options.append(option)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def generic(kind: int, command: int, *attributes: bytes) -> bytes:
    """A message of the kernel's."""
    body = struct.pack("=BBH", command, 1, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


DONE = struct.pack("=IHHII i", 36, 2, 0, 0, 0, 0) + bytes(16)
FAMILY = generic(
    16,
    1,
    netlink.attribute(1, struct.pack("=H", 30)),
    netlink.attribute(
        7, netlink.attribute(1, netlink.attribute(1, b"nbd_mc\0") + netlink.attribute(2, struct.pack("=I", 9)))
    ),
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NetlinkDevice, socket.socket, socket.socket, Noting]]:
    """The device nbd7, the kernel's ends of its two sockets, and the one on which it hears of deaths."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    ours = [Noting(pair[0]) for pair in pairs]
    given = iter(ours)
    monkeypatch.setattr(netlink, "_generic", lambda: next(given))
    for answer in (FAMILY, DONE):
        pairs[0][1].send(answer)
    yield NetlinkDevice("/dev/nbd7", "nbd://here", 512), pairs[0][1], pairs[1][1], ours[1]
    for pair in pairs:
        for end in pair:
            end.close()


Made = tuple[NetlinkDevice, socket.socket, socket.socket, Noting]


def test_a_device_asks_for_its_family_and_joins_its_group(made: Made) -> None:
    device, kernel, _, deaths = made
    asked = kernel.recv(1 << 16)
    assert (struct.unpack_from("=H", asked, 4), asked[16]) == ((16,), 3)
    assert dict(netlink.attributes(asked[20:])) == {2: b"nbd\0"}
    assert (device._family, deaths.options) == (30, [(270, 1, 9)])
    kernel.send(DONE)
    device.disconnect()
    asked = kernel.recv(1 << 16)
    assert (struct.unpack_from("=H", asked, 4), asked[16]) == ((30,), Command.DISCONNECT)
    assert dict(netlink.attributes(asked[20:])) == {1: struct.pack("=I", 7)}


def test_a_device_hears_of_deaths_of_its_own_connections_alone(made: Made) -> None:
    device, _, kernel, _ = made
    own, other = (netlink.attribute(1, struct.pack("=I", index)) for index in (7, 8))
    wake, woken = socket.socketpair()
    with wake, woken:
        for told, died in (
            ([], False),
            ([(Command.LINK_DEAD, other)], False),
            ([(Command.CONNECT, own)], False),
            ([(Command.LINK_DEAD, b"")], False),
            ([(Command.LINK_DEAD, own)], True),
            ([(Command.LINK_DEAD, own), (Command.LINK_DEAD, other)], True),
            ([(Command.LINK_DEAD, other), (Command.LINK_DEAD, own)], True),
            ([], False),  # none is told twice
        ):
            for command, index in told:
                kernel.send(generic(30, command, index))
            assert device.wait(0, wake=wake.fileno()) is died, told
        woken.send(b"x")
        assert device.wait(600, wake=wake.fileno()) is False


def test_a_burst_of_deaths_that_did_not_fit_may_have_had_one_of_ours(made: Made) -> None:
    device, _, _, deaths = made
    script: list[OSError] = [OSError(errno.ENOBUFS, ""), BlockingIOError()]
    deaths.recv = lambda _: (_ for _ in ()).throw(script.pop(0))  # type: ignore[attr-defined]
    assert list(device._died()) == [True]
    script.append(OSError(errno.EIO, ""))
    with pytest.raises(OSError, match=str(errno.EIO)):
        list(device._died())


def test_what_the_system_shows_of_a_device_is_read(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, *_ = made
    monkeypatch.setattr(netlink, "Path", lambda path: tmp_path / path.removeprefix("/"))
    place = tmp_path / "sys/block/nbd7"
    place.mkdir(parents=True)
    assert (device.attached(), device.is_named()) == (False, False)
    for name, content in {"pid": "1\n", "backend": "x\n", "size": "16\n", "ro": "0\n"}.items():
        (place / name).write_text(content)
    assert (device.attached(), device.is_named()) == (True, True)
    assert (device.size_bytes(), device.read_only()) == (8192, False)
    (place / "ro").write_text("1\n")
    assert device.read_only()


@pytest.mark.parametrize(("number", "in_use"), [(errno.EBUSY, True), (errno.ENXIO, False), (0, False)])
def test_a_device_is_in_use_where_it_cannot_be_had_alone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, in_use: bool
) -> None:
    real, asked = os.open, list[int]()

    def open_device(path: Any, flags: int, *given: Any, **named: Any) -> int:
        if path != "/dev/nbd7":
            return real(path, flags, *given, **named)
        asked.append(flags)
        if number:
            raise OSError(number, "")
        return real(tmp_path, os.O_RDONLY)

    monkeypatch.setattr(os, "open", open_device)
    assert made[0].in_use() is in_use
    assert asked == [os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC]
