"""What `attach` prints is what nbd-client and nbdtab can read, or it is refused."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbdzram.cli import attach
from nbdzram.cli.hints import Address, Attachment, Credentials
from nbdzram.errors import UserError
from nbdzram.ready import readable
from tests.unit.cli.conftest import Server, run

FAR = "nbd://192.0.2.10"


@pytest.mark.parametrize("name", ["my disk", "c,d", "k=v", "tab\u3000x", "#commented", "a\u00a0b"])
def test_a_name_that_nbdtab_cannot_hold_is_refused_whole(name: str) -> None:
    done = run("attach", name, "--uri", FAR, "--nbdtab")
    assert (done.code, done.out) == (1, "")
    assert "no quoting" in done.err or "is not an export's name" in done.err
    assert run("attach", name, "--uri", FAR).out.startswith("nbd-client 192.0.2.10") or "is not an export" in done.err


@pytest.mark.parametrize(
    ("uri", "directory"),
    [
        ("nbd+unix:///?socket=/run/my%20disks/nbd.sock", "/tls"),
        ("nbd+unix:///?socket=/run/a,b/nbd.sock", "/tls"),
        ("nbds://192.0.2.10", "/tls of ours"),
        ("nbds://192.0.2.10", "/tls=x"),
    ],
)
def test_no_other_field_of_nbdtab_breaks_the_file_either(uri: str, directory: str) -> None:
    attachment = Attachment(Address.of(uri), "disk", credentials=Credentials(directory))
    with pytest.raises(UserError, match="no quoting"):
        attachment.nbdtab_line()


def test_ordinary_names_stand_in_nbdtab() -> None:
    done = run("attach", "a/b-1.img#2", "--uri", FAR, "--nbdtab")
    assert (done.code, done.out) == (0, "nbd0 192.0.2.10 a/b-1.img#2 port=10809,persist\n")
    assert done.err == ""


def test_a_port_that_old_clients_ignore_in_nbdtab_is_told() -> None:
    done = run("attach", "disk", "--uri", f"{FAR}:18097", "--nbdtab")
    assert (done.code, done.out) == (0, "nbd0 192.0.2.10 disk port=18097,persist\n")
    assert "connects to 10809 all the same" in done.err
    assert "3.26" in done.err


@pytest.mark.parametrize("uri", ["nbd://-d", "nbd://-c:10809", "nbds://-unix/disk"])
def test_a_host_is_never_an_option_of_nbd_clients(uri: str) -> None:
    done = run("attach", "disk", "--uri", uri)
    assert (done.code, done.out) == (2, "")
    assert "a host is a name or an address" in done.err


@pytest.mark.parametrize(
    ("uri", "clue"),
    [
        ("nbd://h\nx", "characters of no URI"),
        ("nbd://h\tx", "characters of no URI"),
        ("nbd://192.0.2.10/?socket=/tmp/x", "names a socket, and is none of a unix socket"),
        ("nbd://192.0.2.10/disk2", "names the export 'disk2', and 'disk' is to be attached"),
        ("nbd://h:0", "names port 0"),
        ("nbd+unix:///?socket=%00", "printable characters"),
        ("nbd+unix:///?socket=/a%0ab", "printable characters"),
        ("nbd+unix:///?socket=/%ff", "can't decode byte 0xff"),
        ("nbd://%2dd", "a host is a name or an address"),
    ],
)
def test_an_address_that_would_lead_elsewhere_is_refused(uri: str, clue: str) -> None:
    """Line ends left out of a host make another one, port 0 became the usual one, and no path has a NUL."""
    done = run("attach", "disk", "--uri", uri)
    assert (done.code, done.out) == (2, "")
    assert clue in done.err


def test_an_interface_behind_an_address_is_told_as_each_program_takes_it() -> None:
    """RFC 6874 has %25 before it, and many write it plainly."""
    assert Address.of("nbd://[fe80::1%25eth0]").uri("disk") == "nbd://[fe80::1%25eth0]:10809/disk"
    for uri in ("nbd://[fe80::1%25eth0]", "nbd://[fe80::1%eth0]"):
        assert run("attach", "disk", "--uri", uri).out == "nbd-client fe80::1%eth0 10809 /dev/nbd0 -name disk\n"


@pytest.mark.parametrize(
    "device", ["/dev/sda", "-d", "/dev/nbd0p1", "nbd", "/dev/nbd/0", "", "/dev/nbd00", "nbd\u0663"]
)
def test_a_device_is_one_of_the_kernels_nbd(device: str) -> None:
    done = run("attach", "disk", "--uri", FAR, "--", device)
    assert (done.code, done.out) == (2, "")
    assert "/dev/nbd0, /dev/nbd1" in done.err


def test_a_device_may_be_named_as_nbdtab_names_it() -> None:
    assert run("attach", "disk", "nbd7", "--uri", FAR).out == "nbd-client 192.0.2.10 10809 /dev/nbd7 -name disk\n"


def test_on_this_machine_a_disk_is_attached_over_the_unix_socket(start: Callable[..., Server]) -> None:
    """Whatever else the server listens on: it is the faster way."""
    server = start("-i", "127.0.0.1", "-p", "0", "-e", "disk=1M")
    assert server.run("attach", "disk").out == f"nbd-client -unix {server.socket} /dev/nbd0 -name disk\n"


def test_what_a_server_serves_for_swap_is_attached_for_swap(start: Callable[..., Server]) -> None:
    """As the line that it printed itself; without -swap nbd-client may wait for what waits for it."""
    server = start("-e", "disk=1M", "--swap")
    line = f"nbd-client -unix {server.socket} /dev/nbd0 -name disk -swap"
    assert server.greeting[-3].strip().startswith(line)
    done = server.run("attach", "disk")
    assert (done.out, "never swap on the machine that serves" in done.err) == (f"{line}\n", True)
    assert server.run("attach", "disk", "--nbdtab").out == f"nbd0 {server.socket} disk unix,swap,persist\n"
    assert server.run("attach", "disk", "--uri", FAR, "--swap").out.endswith("-name disk -swap\n")
    far = run("attach", "disk", "--uri", FAR)
    assert far.out.endswith("-name disk\n")
    assert "never swap" not in far.err


def test_a_certificate_of_the_clients_own_is_named_where_it_has_one(tmp_path: Path) -> None:
    words = ("attach", "disk", "--uri", "nbds://192.0.2.10", "--tls-certificates", str(tmp_path))
    assert "holds no ca-cert.pem" in run(*words).err
    (tmp_path / "ca-cert.pem").touch()
    trusted = f"nbd-client 192.0.2.10 10809 /dev/nbd0 -name disk -cacertfile {tmp_path}/ca-cert.pem"
    assert run(*words).out == f"{trusted}\n"
    (tmp_path / "client-cert.pem").touch()
    own = f"-certfile {tmp_path}/client-cert.pem -keyfile {tmp_path}/client-key.pem"
    assert run(*words).out == f"{trusted} {own}\n"


def test_that_nbd_client_knows_no_pre_shared_keys_is_told(tmp_path: Path, start: Callable[..., Server]) -> None:
    """No certificate that a client names would help; the server's own start does not print such a line either."""
    keys = tmp_path / "keys.psk"
    keys.touch(mode=0o600)
    keys.write_text(f"me:{'ab' * 16}\n")
    server = start("-e", "disk=1M", "--tls", "require", "--tls-psk-file", str(keys))
    assert "nbd-client" not in "".join(server.greeting)
    for words in ((), ("--nbdtab",)):
        done = server.run("attach", "disk", *words)
        assert attach.NO_CERTIFICATE in done.err


@pytest.mark.parametrize(("given", "connections"), [((), 2), (("-C", "1"), 2), (("-C", "4"), 4)])
def test_who_persists_has_a_second_connection_to_ask_again_over(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], connections: int
) -> None:
    seen: list[int] = []

    def persist(*_: Any, connections: int, **__: Any) -> None:
        seen.append(connections)

    monkeypatch.setattr(attach, "_persist", persist)
    CliRunner().invoke(attach.command, ["disk", "--uri", FAR, "--persist", *given])
    assert seen == [connections]


def test_a_signal_wakes_who_waits_and_the_second_ends_the_process() -> None:
    """Of one that came before the wait, too."""
    known = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = signal.set_wakeup_fd(-1)
    try:
        for number, other in ((signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
            with attach._signals() as (reader, came):
                assert not came()
                assert not readable(reader, seconds=0)
                signal.raise_signal(number)
                assert came()
                assert readable(reader, seconds=0)
                assert signal.getsignal(number) == signal.SIG_DFL
                assert signal.getsignal(other) != signal.SIG_DFL
            assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in known.items():
            signal.signal(number, handler)
