"""`nbdzram attach`: the nbd-client line for an export, printed, run, or kept in nbdtab; or attached and kept by us."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from nbdzram.cli.common import OUR_PATH, connect, control_option, export_names, require_export
from nbdzram.cli.diagnosis import Kernel, Module
from nbdzram.cli.hints import NO_TLS, Address, Attachment, Credentials, tellable
from nbdzram.cli.numbers import Whole, WholeSeconds
from nbdzram.config import DEFAULT_PORT
from nbdzram.errors import ConfigError, UserError
from nbdzram.units import said
from nbdzram.values import export_name

OLD_CLIENTS_PORT = (
    f"nbd-client before 3.26 (Debian 12 has 3.24) takes port= and connects to {DEFAULT_PORT} all the same "
    "(NetworkBlockDevice/nbd#154): there, serve on that port, or attach with the nbd-client line"
)
MOST_CONNECTIONS = 64
KEPT_CONNECTIONS = 2
"""With one, the kernel answers a READ whose reply broke off with an error; with two it asks again (nbd_read_stat)."""
REQUEST_SECONDS = 10
"""What was in flight when a server went is sent again after so long. A live server answers in milliseconds."""
DEAD_SECONDS = 600
"""A machine that serves has booted again by then."""
SWAP_HERE = (
    "never swap on the machine that serves, which would need memory to free memory: attach it on another one, where "
    "--uri names this one's address"
)
NO_DIRECTORY = (
    "DIR: where ca-cert.pem is, and client-cert.pem with client-key.pem if the server asks for them; "
    "--tls-certificates names it"
)
NO_CERTIFICATE = (
    "the server tells of no certificate: where it has pre-shared keys alone, of which nbd-client knows nothing, QEMU "
    "and libnbd attach, as the server's start says"
)
NO_MODULE = f"the kernel {platform.release()} has no module nbd here; QEMU and libnbd attach without it"


@click.command(
    "attach",
    epilog="\b\nExamples:\n  nbdzram attach disk                          # print the line\n"
    "  sudo nbdzram attach disk /dev/nbd0 --run     # run it\n"
    "  nbdzram attach disk --uri nbd://192.0.2.10 --nbdtab -C 4\n"
    "  sudo nbdzram attach disk /dev/nbd0 --persist # and keep it attached",
)
@click.argument("export", shell_complete=export_names)
@click.argument("device", default="/dev/nbd0", type=click.Path(readable=False))
@click.option("--run", "run_it", is_flag=True, help="Run the line, after loading the kernel module nbd if need be.")
@click.option("--nbdtab", is_flag=True, help="Print the line of /etc/nbdtab instead.")
@click.option("--uri", metavar="URI", help="The server's address, if it is not on this machine.")
@click.option(
    "-C",
    "--connections",
    metavar="N",
    type=Whole(1, MOST_CONNECTIONS),
    help="Connections.  [default: 1; 2 with --persist]",
)
@click.option(
    "--persist",
    is_flag=True,
    help="Attach it ourselves, stay in the foreground, and connect again whenever a connection dies: requests wait "
    "instead of failing. Ended by a signal, it detaches the device if nobody uses it.",
)
@click.option(
    "--request-timeout",
    "request_seconds",
    metavar="SECONDS",
    type=WholeSeconds(1, 3600),
    help=f"With --persist: what is not answered by then is sent again, elsewhere.  [default: {REQUEST_SECONDS}]",
)
@click.option(
    "--dead-timeout",
    "dead_seconds",
    metavar="SECONDS",
    type=WholeSeconds(1, 1 << 20),
    help=f"With --persist: without any connection for so long, requests are I/O errors.  [default: {DEAD_SECONDS}]",
)
@click.option(
    "--block-size",
    type=click.Choice(["512", "1024", "2048", "4096"]),
    help="With --persist: the device's sectors, as partition tables count them.  [default: 512]",
)
@click.option(
    "--swap", is_flag=True, help="The device will be swap.  [default: if the server on this machine was started so]"
)
@click.option(
    "--tls-certificates",
    "certificates",
    metavar="DIR",
    type=OUR_PATH,
    help="For a server with TLS: where ca-cert.pem is, and client-cert.pem with client-key.pem if it asks for them.",
)
@control_option
def command(
    *,
    export: str,
    device: str,
    run_it: bool,
    nbdtab: bool,
    uri: str | None,
    connections: int | None,
    persist: bool,
    request_seconds: int | None,
    dead_seconds: int | None,
    block_size: str | None,
    swap: bool,
    certificates: Path | None,
    control: Path | None,
) -> None:
    """Attach EXPORT to DEVICE with the kernel's own client, or show how.

    Without --uri the server on this machine is asked where it listens.
    """
    if not persist and (request_seconds or dead_seconds or block_size):
        raise ConfigError(
            "--request-timeout, --dead-timeout and --block-size are for --persist; nbd-client has its own"
        )
    if persist and nbdtab:
        raise ConfigError("--persist goes not with --nbdtab: its lines are nbd-client's")
    if persist and certificates:
        raise ConfigError(f"--persist goes not with --tls-certificates: they are for TLS, {NO_TLS}")
    address, swap = (_address_of(uri, export), swap) if uri else _on_this_machine(export, control, swap=swap)
    try:
        export_name(export)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not address.kernel_can_attach:
        raise UserError("nbd-client speaks no vsock; let the server listen on TCP or a unix socket too")
    if persist and address.over_tls:
        raise UserError(f"the server at {address.uri(export)} asks for TLS, {NO_TLS}")
    if persist:
        kept = max(connections or KEPT_CONNECTIONS, KEPT_CONNECTIONS)
        patience = request_seconds or REQUEST_SECONDS, dead_seconds or DEAD_SECONDS
        return _persist(
            address, export, _device(device), connections=kept, patience=patience, block_size=int(block_size or 512)
        )
    if run_it and address.over_tls and certificates is None:
        raise UserError(f"the server at {address.uri(export)} asks for TLS; give --tls-certificates DIR")
    attachment = Attachment(address, export, _device(device), connections or 1, swap, _credentials(certificates))
    if nbdtab:
        line = attachment.nbdtab_line()
        if address.path is None and address.port != DEFAULT_PORT:
            click.echo(f"# {OLD_CLIENTS_PORT}", err=True)
        return click.echo(line)
    words = attachment.command()
    if not run_it:
        for hint in missing(attachment, certificates, Kernel()):
            click.echo(f"# {hint}", err=True)
        return click.echo(shlex.join(words))
    _run(words, attachment.device)
    click.echo(f"attached {said(export)} to {attachment.device}; detach it with: nbd-client -d {attachment.device}")
    return None


def _address_of(uri: str, export: str) -> Address:
    """Raises ConfigError, also for a URI that names another export: one of the two is not what was meant."""
    address = Address.of(uri)
    named = unquote(urlsplit(uri).path.removeprefix("/"))
    if named not in ("", export):
        raise ConfigError(
            f"'{uri}' names the export '{named}', and '{export}' is to be attached; leave one of them out"
        )
    return address


def _device(given: str) -> str:
    """/dev/nbdN, also told as nbdN. Any other would be taken by nbd-client, and end badly. Raises UserError."""
    match = re.fullmatch(r"(?:/dev/)?(nbd(?:0|[1-9][0-9]{0,3}))", given)
    if match is None:
        raise ConfigError(f"'{given}' is no device of the kernel's NBD client; those are /dev/nbd0, /dev/nbd1, ...")
    return f"/dev/{match[1]}"


def _credentials(directory: Path | None) -> Credentials:
    """What is there; without a directory the line says DIR in its place. Raises UserError."""
    if directory is None:
        return Credentials()
    if not os.access(directory / "ca-cert.pem", os.R_OK):
        raise UserError(
            f"{directory} holds no ca-cert.pem that this user may read; "
            "put the certificate there of the authority that signed the server's"
        )
    return Credentials(str(directory.absolute()), own=os.access(directory / "client-cert.pem", os.R_OK))


def _on_this_machine(export: str, control: Path | None, *, swap: bool) -> tuple[Address, bool]:
    """The server's unix socket if it has one, else its first address; and whether it is for `swap`, as it is where the
    server was started so: then `serve` prints the same line. Raises NoSuchExport, UserError.
    """
    with connect(control) as client:
        status = client.status()
        require_export(export, [known.name for known in status.exports])
    addresses = [Address.of(uri) for uri in tellable(status.uris)]
    addresses = [address for address in addresses if address.kernel_can_attach]
    if not addresses:
        raise UserError("the server listens on no address that nbd-client can reach; add -i, -p or -U")
    if addresses[0].over_tls and status.certificate_expires_at is None and not status.starting:
        click.echo(f"# {NO_CERTIFICATE}", err=True)
    swap = swap or status.swap
    if swap:
        click.echo(f"# {SWAP_HERE}", err=True)
    return next((address for address in addresses if address.path is not None), addresses[0]), swap


def missing(attachment: Attachment, certificates: Path | None, kernel: Kernel) -> list[str]:
    """What the printed line still needs, and what this machine lacks for it to work."""
    hints = []
    if attachment.address.over_tls and certificates is None:
        hints.append(NO_DIRECTORY)
    if attachment.address.over_tls and attachment.swap:
        hints.append("swap over TLS can lock the machine up: nbd-client(8), TLS SUPPORT")
    if shutil.which("nbd-client", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        hints.append("nbd-client is missing: apt-get install nbd-client")
    if kernel.nbd is Module.ABSENT:
        hints.append(NO_MODULE)
    elif kernel.nbd is Module.LOADABLE:
        hints.append("the kernel module nbd is not loaded: modprobe nbd")
    if os.geteuid() != 0:
        hints.append("attaching needs root")
    return hints


def _run(line: list[str], device: str) -> None:
    if os.geteuid() != 0:
        raise UserError(f"attaching needs root; run it with sudo: {shlex.join(line)}")
    _make_device(device)
    _call(line, f"attach {device}")


def _make_device(device: str) -> None:
    module = Kernel().nbd
    if module is Module.ABSENT and not Path(device).is_block_device():
        raise UserError(NO_MODULE)
    if module is Module.LOADABLE:
        _call(["modprobe", "nbd"], "load the kernel module nbd")
    if not Path(device).is_block_device():
        raise UserError(f"{device} is not a block device; the module nbd makes /dev/nbd0 to /dev/nbd15")


def _persist(
    address: Address, export: str, device: str, *, connections: int, patience: tuple[int, int], block_size: int
) -> None:
    """Attach it and stay, until it is detached. Whatever that needs is loaded, and locked, before it is attached."""
    from nbdzram.cli.greeting import dialler  # noqa: PLC0415 - most attach without
    from nbdzram.cli.keep import Keeper  # noqa: PLC0415
    from nbdzram.cli.netlink import NetlinkDevice, Patience  # noqa: PLC0415
    from nbdzram.cli.supervisor import notify_supervisor  # noqa: PLC0415
    from nbdzram.cli.voice import Voice  # noqa: PLC0415
    from nbdzram.residence import stay  # noqa: PLC0415

    if os.geteuid() != 0:
        raise UserError("attaching needs root; run it with sudo")
    _make_device(device)

    kernel = NetlinkDevice(device, address.uri(export), block_size)
    refusals = stay()
    with Voice(sys.stderr.fileno()) as voice, _signals() as (wake, told):
        for refusal in refusals:
            voice.say(f"{refusal}; else a swap or root disk on {device} may wait for this process, and it for the disk")
        keeper = Keeper(
            kernel,
            device,
            dialler(address, export),
            connections,
            Patience(*patience),
            wake=wake,
            told_to_leave=told,
            say=voice.say,
        )
        did = f"attached {said(export)} to {device}" if keeper.attach() else f"looking after {device}"
        notify_supervisor("READY=1")
        voice.say(f"{did}; without a server requests wait {patience[1]} s")
        voice.say(f"detach it with: nbd-client -d {device}")
        if not keeper.keep():
            voice.say(f"{device} was detached")
        elif keeper.leave():
            voice.say(f"detached {device}")
        else:
            voice.say(
                f"{device} is in use and stays attached; run this again, or nobody connects it again when its server "
                "goes"
            )


@contextmanager
def _signals() -> Iterator[tuple[int, Callable[[], bool]]]:
    """A descriptor that can be read once SIGTERM or SIGINT came, and whether it did. The second ends the process."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
        try:
            yield reader.fileno(), lambda: bool(came)
        finally:
            signal.set_wakeup_fd(before)


def _call(line: list[str], purpose: str) -> None:
    try:
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise UserError(f"cannot {purpose}: {line[0]} is missing; apt-get install nbd-client kmod") from None
    except OSError as error:
        raise UserError(
            f"cannot {purpose}: {line[0]} cannot be run: {error.strerror}; apt-get install --reinstall nbd-client kmod"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"cannot {purpose}: {reason}")
