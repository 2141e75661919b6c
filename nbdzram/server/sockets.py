"""Listening sockets, opened by us or handed over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import itertools
import logging
import os
import pwd
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from nbdzram.config import TcpAddress, TlsMode, UnixAddress, VsockAddress
from nbdzram.errors import UserError, reason_of
from nbdzram.listening import NO_FAMILY, listen_on, look_up
from nbdzram.unread import UNHEARD_SECONDS, ask, keep_little

BACKLOG = 512
"""Connections that wait to be accepted. The loop listens once more when it takes a socket over, and is told it too."""

_NO_FAMILY = "this machine has no IPv6: -i 0.0.0.0 is all of IPv4, 127.0.0.1 this machine alone"
_REMEDIES = {
    errno.EADDRNOTAVAIL: "-i takes an address of this machine, 0.0.0.0 and :: stand for all",
    errno.EAFNOSUPPORT: _NO_FAMILY,
    errno.EPROTONOSUPPORT: _NO_FAMILY,
    errno.EACCES: "ports below 1024 are root's; choose another port (-p)",
}
LARGEST_ID = (1 << 32) - 2
"""Of a user or group; the number behind it means "as it is" (chown(2))."""

ANY_CONTEXT, LOOPBACK_CONTEXT, HOST_CONTEXT = 0xFFFFFFFF, 1, 2
_GET_LOCAL_CONTEXT = 0x7B9
"""Of vsock: the numbers of vsock(7), and its IOCTL_VM_SOCKETS_GET_LOCAL_CID of /dev/vsock."""

SHORTEST_PLACE = "/tmp"  # noqa: S108 - made with a name that nobody foresees
DEEPEST_PLACE = 107 - len("/nbdzram-12345678/control.sock")
"""Bytes of the path of a directory, so that a socket fits that lies in one of ours in there (unix(7))."""

STDIN = 0
FIRST_INHERITED_FD = 3  # sd_listen_fds(3)
ARENA_PREFIX = "pool-"  # of the name of a descriptor that is no socket, but a pool's arena: kept for us from before

log = logging.getLogger("nbdzram.server")

KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A peer that vanished without a word is noticed within two minutes."""


class FamilyLacking(UserError):
    """An address of a family that this machine does not have at all."""


@contextlib.contextmanager
def place_for_sockets() -> Iterator[Path]:
    """A directory of our own, that goes again. Raises UserError.

    It is the system's for such (TMPDIR) unless a socket there had too long a path, or none that a URI can tell.
    """
    try:
        given = tempfile.gettempdir()
        fits = given.isprintable() and len(given.encode()) <= DEEPEST_PLACE
        directory = Path(tempfile.mkdtemp(prefix="nbdzram-", dir=given if fits else SHORTEST_PLACE))
    except OSError as error:
        raise UserError(
            f"cannot make a directory for a socket: {error.strerror}; set TMPDIR to one where this user may write, of "
            f"at most {DEEPEST_PLACE} bytes"
        ) from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def open_tcp(address: TcpAddress) -> list[socket.socket]:
    """One socket for each address that the host name stands for and this machine has. Raises UserError.

    What this machine lacks is passed over with a warning as long as something can be served. An address in use is an
    error: clients would reach whoever uses it.
    """
    try:
        found = look_up(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {address}: {reason_of(error)}; write an address of this machine") from None
    try:
        opened, lacking = listen_on(found, BACKLOG)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(address, error) from None
    for host, lack in lacking:
        log.warning("not listening on %s, for which %s stands too: %s", host, address, lack.strerror)
    return opened


def _cannot_listen(address: TcpAddress, error: OSError | OverflowError) -> UserError:
    kind = FamilyLacking if getattr(error, "errno", None) in NO_FAMILY else UserError
    number = getattr(error, "errno", None)
    remedy = _REMEDIES.get(number or 0, "choose another port (-p) or address (-i), or stop what uses it")
    return kind(f"cannot listen on {address}: {reason_of(error)}; {remedy}")


def open_unix(address: UnixAddress) -> socket.socket:
    """A socket file with its mode and owner; a stale file of a dead server is replaced. Raises UserError.

    The mode holds from the first instant, and nothing that follows a link is done to the path: in a directory that
    others may write, the file could be another one by then. Where it fails it leaves no file.
    """
    path, made = address.path, False
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~address.mode)  # only start-up code runs meanwhile
    try:
        owner = None if address.owner is None else _owner(address.owner)
        _remove_stale(path)
        listener.bind(str(path))
        made = True
        if owner is not None:
            os.chown(path, *owner, follow_symlinks=False)
        listener.listen(BACKLOG)
    except (OSError, LookupError) as error:
        listener.close()
        if made:
            with contextlib.suppress(OSError):
                path.unlink()
        reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else error)
        remedy = "-U names a path where this user may make one"
        if isinstance(error, LookupError):
            remedy = "owner= takes a user and a group of this machine"
        elif made and address.owner is not None:
            remedy = f"only root may give it to '{address.owner}': leave out owner=, or start as root"
        raise UserError(f"cannot listen on the unix socket {path}: {reason}; {remedy}") from None
    finally:
        os.umask(mask)
    return listener


def _owner(owner: str) -> tuple[int, int]:
    """The numbers of USER, USER:GROUP or :GROUP; -1 leaves one as it is. Raises LookupError."""
    user, _, group = owner.partition(":")
    return (
        _id_of("user", user, lambda name: pwd.getpwnam(name).pw_uid),
        _id_of("group", group, lambda name: grp.getgrnam(name).gr_gid),
    )


def _id_of(kind: str, named: str, find: Callable[[str], int]) -> int:
    if not named:
        return -1
    try:
        number = int(named) if named.isdecimal() else find(named)
    except (KeyError, ValueError):  # ValueError: a number of thousands of digits
        number = LARGEST_ID + 1
    if number > LARGEST_ID:
        raise LookupError(f"no such {kind}: {named!r}")
    return number


def open_vsock(address: VsockAddress) -> socket.socket:
    """Any local context, as a VM host or guest sees it. Raises UserError."""
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except (AttributeError, OSError) as error:
        raise UserError(f"this machine has no vsock ({error}); modprobe vsock, or leave out --vsock") from None
    try:
        listener.bind((socket.VMADDR_CID_ANY, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on vsock port {address.port}: {error.strerror}; choose another with --vsock PORT"
        ) from None
    return listener


def as_the_loop_takes_it(endpoint: socket.socket) -> socket.socket:
    """The same socket for the event loop, which knows no vsock: what it does to a unix stream every stream understands.

    Who is at the other end has to be asked of the socket then (connection.peer_of), and not of the transport.
    """
    if endpoint.family != getattr(socket, "AF_VSOCK", socket.AF_UNIX):
        return endpoint
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(endpoint.fileno()))


def _is_served(endpoint: socket.socket) -> bool:
    families = {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, getattr(socket, "AF_VSOCK", socket.AF_UNIX)}
    return endpoint.type == socket.SOCK_STREAM and endpoint.family in families


def inherited(environment: Mapping[str, str]) -> list[socket.socket]:
    """Sockets passed by systemd or libnbd (LISTEN_PID, LISTEN_FDS; sd_listen_fds(3)). Raises UserError."""
    passed = [(fd, name) for fd, name in _passed(environment) if not name.startswith(ARENA_PREFIX)]
    count, sockets = len(passed), []
    for fd, named in passed:
        name = f" ({named})" if named else ""
        try:
            sockets.append(socket.socket(fileno=fd))
            if not sockets[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise UserError(
                    f"LISTEN_FDS={count}, but the socket {fd}{name} does not listen; in systemd's unit file, use"
                    " Accept=no, or serve one connection with --stdin"
                )
            if not _is_served(sockets[-1]):
                raise UserError(
                    f"LISTEN_FDS={count}, but the socket {fd}{name} is no stream of IP, unix or vsock; in systemd's"
                    " unit file, use ListenStream="
                )
        except OSError as error:
            raise UserError(f"LISTEN_FDS={count}, but descriptor {fd}{name} is not a socket: {error}") from None
    return sockets


def inherited_arenas(environment: Mapping[str, str]) -> dict[str, int]:
    """Pools' arenas that systemd kept from the last process of the unit, by pool. Raises UserError."""
    passed = [(fd, name) for fd, name in _passed(environment) if name.startswith(ARENA_PREFIX)]
    for fd, name in passed:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise UserError(f"LISTEN_FDNAMES names the descriptor {fd} {name}, and it is not there: {error}") from None
    return {name.removeprefix(ARENA_PREFIX): fd for fd, name in passed}


def _passed(environment: Mapping[str, str]) -> list[tuple[int, str]]:
    """Descriptors, and their names as far as they have some."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environment.get("LISTEN_FDS", "0")
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"LISTEN_FDS={text!r} is not a number of sockets")
    fds = range(FIRST_INHERITED_FD, FIRST_INHERITED_FD + int(text))
    names = itertools.chain(environment.get("LISTEN_FDNAMES", "").split(":"), itertools.repeat(""))
    return list(zip(fds, names, strict=False))


def take_stdin() -> socket.socket:
    """The connection on standard input, as inetd gives it. Nothing else may write to it any more. Raises UserError."""
    try:
        client = socket.socket(fileno=os.dup(STDIN))
        client.getpeername()
    except OSError as error:
        raise UserError(
            f"--stdin needs a connected socket as standard input, as inetd gives it: {error.strerror}"
        ) from None
    if not _is_served(client):
        raise UserError("--stdin needs a stream of IP, unix or vsock as standard input; in inetd.conf, write stream")
    with Path(os.devnull).open("r+b", buffering=0) as nothing:
        for fd in range(3):
            if fd == STDIN or os.path.sameopenfile(fd, client.fileno()):
                os.dup2(nothing.fileno(), fd)
    return client


def set_bounds(endpoint: socket.socket) -> None:
    """Notice peers that vanish, so that none holds a connection for ever, and let the system keep little for any.

    Of a listening socket, what it accepts inherits this (tcp(7)): nothing is left to do, or to fail, for each client.
    """
    if endpoint.family in (socket.AF_INET, socket.AF_INET6):
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        ask(endpoint, *KEEPALIVE)
        keep_little(endpoint, UNHEARD_SECONDS)


def uri_of(listener: socket.socket, tls: TlsMode) -> str:
    """How a client names it: NBD's doc/uri.md."""
    scheme = "nbds" if tls is TlsMode.REQUIRE else "nbd"
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"{scheme}+unix:///?socket={quote(name)}"
    if listener.family == socket.AF_INET6:
        return f"{scheme}://[{name[0]}{_interface(name[3])}]:{name[1]}"
    if listener.family == socket.AF_INET:
        return f"{scheme}://{name[0]}:{name[1]}"
    return f"{scheme}+vsock://{_context(name[0])}:{name[1]}"


def _interface(number: int) -> str:
    """What stands behind a link-local address in a URI (RFC 6874): without it nobody can connect there."""
    if not number:
        return ""
    try:
        return f"%25{quote(socket.if_indextoname(number), safe='')}"
    except OSError:  # it is gone
        return f"%25{number}"


def _context(bound: int) -> int:
    """The number by which others reach a vsock socket. Any: that of this machine, where it is a virtual one, and
    otherwise that by which its own virtual machines know it."""
    if bound != ANY_CONTEXT:
        return bound
    own = bytearray(4)
    try:
        with Path("/dev/vsock").open("rb") as device:
            fcntl.ioctl(device, _GET_LOCAL_CONTEXT, own)
    except OSError:
        return HOST_CONTEXT
    found = int.from_bytes(own, sys.byteorder)
    return HOST_CONTEXT if found in (ANY_CONTEXT, LOOPBACK_CONTEXT) else found


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on. Raises FileExistsError for anything else that stands there."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "something that is no socket stands there")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog would keep us waiting
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except BlockingIOError:
                pass
        raise FileExistsError(errno.EEXIST, "another server listens there")
