"""How clients attach: the nbd-client line, the nbdtab line, and what libnbd and QEMU are told.

Sources: nbd-client(8), nbdtab(5), doc/uri.md of the NBD project for the URI's parts, nbd_connect_uri(3) for its TLS
parameters, qemu-img(1) for --object and --image-opts.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from nbdzram.config import DEFAULT_PORT, TlsConfig
from nbdzram.errors import ConfigError, UserError

_HOST = re.compile(r"[^\s/-][^\s/]*")
_NBDTAB_FIELD = re.compile(r"[^\s,=#][^\s,=]*")
"""What nbdtab's own reader takes for a word (nbdtab_lexer.l of the NBD project)."""

NO_TLS = (
    "which the kernel does not speak, and a proxy for it could wait for the disk that waits for it; let a tunnel end "
    "on this machine instead (ssh -N -L /run/far.sock:/run/nbdzram.sock HOST, WireGuard), and attach with --uri "
    "'nbd+unix:///?socket=/run/far.sock'; without --persist nbd-client has such a proxy, whose requests fail while the "
    "server restarts"
)
"""Follows a sentence that says where TLS is asked for."""


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a server, read from its URI: either host and port, or the path of a unix socket."""

    scheme: str
    host: str
    port: int
    path: str | None

    @classmethod
    def of(cls, uri: str) -> Address:
        """Read nbd://HOST:PORT or nbd+unix:///?socket=PATH (nbds for TLS). Raises ConfigError."""
        if not uri.isprintable():  # urlsplit leaves line ends and tabs out: what stands around them became one host
            raise ConfigError(f"{uri!r} is not an NBD URI such as nbd://127.0.0.1:10809: it has characters of no URI")
        try:
            parts = urlsplit(uri)
            port = parts.port
            path = parse_qs(parts.query, errors="strict").get("socket", [None])[0]
        except ValueError as error:
            raise ConfigError(f"'{uri}' is not an NBD URI such as nbd://127.0.0.1:10809: {error}") from None
        scheme, _, transport = parts.scheme.partition("+")
        if scheme not in {"nbd", "nbds"} or transport not in {"", "tcp", "unix", "vsock"}:
            raise ConfigError(f"'{uri}' is not an NBD URI such as nbd://127.0.0.1:10809 or nbd+unix:///?socket=PATH")
        if transport == "unix" and path is None:
            raise ConfigError(f"'{uri}' names no socket; write nbd+unix:///?socket=PATH")
        if transport != "unix" and path is not None:
            raise ConfigError(f"'{uri}' names a socket, and is none of a unix socket; write nbd+unix:///?socket=PATH")
        if path is not None and not path.isprintable():
            raise ConfigError(f"'{uri}' names the socket {path!r}; a path has printable characters here")
        if port == 0:
            raise ConfigError(f"'{uri}' names port 0, at which nobody listens; leave it out for {DEFAULT_PORT}")
        host = unquote(parts.hostname or "127.0.0.1")  # %25 stands before an interface's name (RFC 6874)
        # To nbd-client "-d" is an option, and would detach a device.
        if not _HOST.fullmatch(host) or not host.isprintable():
            raise ConfigError(f"'{uri}' names the host {host!r}; a host is a name or an address, such as 192.0.2.10")
        return cls(parts.scheme, host, port or DEFAULT_PORT, path)

    @property
    def kernel_can_attach(self) -> bool:
        """nbd-client speaks TCP and unix sockets."""
        return not self.scheme.endswith("+vsock")

    @property
    def over_tls(self) -> bool:
        """The server asks for TLS."""
        return self.scheme.startswith("nbds")

    def uri(self, export: str, credentials: Credentials | None = None) -> str:
        """The URI of one export, for libnbd; without TLS for QEMU too."""
        name, user, parameters = quote(export, safe=""), "", []
        if self.path is not None:
            parameters.append(f"socket={quote(self.path)}")
        if credentials is not None and self.over_tls:
            user = f"{credentials.user}@" if credentials.user else ""
            parameters.append(credentials.uri_parameter)
        query = f"?{'&'.join(parameters)}" if parameters else ""
        if self.path is not None:
            return f"{self.scheme}://{user}/{name}{query}"
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else self.host
        return f"{self.scheme}://{user}{host}:{self.port}/{name}{query}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows and trusts over TLS: files under the names that libnbd and QEMU look for in a directory."""

    directory: str = "DIR"
    own: bool = False  # a certificate of the client's own, not only the authority's
    user: str | None = None  # the client's name in keys.psk: a pre-shared key takes the certificates' place

    @property
    def files(self) -> dict[str, str]:
        """Each file's name, by the option that nbd-client and nbdtab have for it; neither speaks pre-shared keys."""
        if self.user:
            return {"psk": "keys.psk"}
        own = {"certfile": "client-cert.pem", "keyfile": "client-key.pem"} if self.own else {}
        return {"cacertfile": "ca-cert.pem"} | own

    @property
    def uri_parameter(self) -> str:
        """As libnbd takes it."""
        directory = quote(self.directory)
        return f"tls-psk-file={directory}/keys.psk" if self.user else f"tls-certificates={directory}"

    @property
    def qemu_object(self) -> str:
        """As QEMU takes it, under the id tls0."""
        kind, user = ("psk", {"username": self.user}) if self.user else ("x509", {})
        return f"tls-creds-{kind},{_options({'id': 'tls0', 'endpoint': 'client', 'dir': self.directory, **user})}"


@dataclass(frozen=True, slots=True)
class Attachment:
    """How the kernel's own client is to attach an export to a device."""

    address: Address
    export: str
    device: str = "/dev/nbd0"
    connections: int = 1
    swap: bool = False
    credentials: Credentials = Credentials()

    @property
    def _files(self) -> dict[str, str]:
        if not self.address.over_tls:
            return {}
        return {option: f"{self.credentials.directory}/{name}" for option, name in self.credentials.files.items()}

    def command(self) -> list[str]:
        """The nbd-client command."""
        address = self.address
        where = ["-unix", address.path] if address.path is not None else [address.host, str(address.port)]
        options = ["-name", self.export]
        options += ["-connections", str(self.connections)] if self.connections > 1 else []
        options += ["-swap"] if self.swap else []
        options += [word for option, file in self._files.items() for word in (f"-{option}", file)]
        return ["nbd-client", *where, self.device, *options]

    def nbdtab_line(self) -> str:
        """The line of /etc/nbdtab with which `nbd-client nbdN` and nbd@nbdN.service attach it. Raises UserError."""
        address = self.address
        options = ["unix"] if address.path is not None else [f"port={address.port}"]
        options += [f"conns={self.connections}"] if self.connections > 1 else []
        options += ["swap"] if self.swap else []
        options += [f"{option}={file}" for option, file in self._files.items()]
        options += ["persist"]
        fields = [self.device.removeprefix("/dev/"), address.path or address.host, self.export, ",".join(options)]
        for field in (*fields[:3], *self._files.values()):
            if not _NBDTAB_FIELD.fullmatch(field):
                raise UserError(
                    f"'{field}' cannot stand in nbdtab, which has no quoting: a blank, a comma, '=', or '#' in front "
                    "would make the whole file unreadable; leave out --nbdtab for the nbd-client line, which takes it"
                )
        return " ".join(fields)


def qemu_img(address: Address, export: str, credentials: Credentials) -> list[str]:
    """The qemu-img command that looks at an export. QEMU's URIs have no place for certificates."""
    if not address.over_tls:
        return ["qemu-img", "info", address.uri(export)]
    if address.path is not None:
        server = {"type": "unix", "path": address.path}
    else:
        server = {"type": "inet", "host": address.host, "port": str(address.port)}
    image = {"driver": "raw", "file.driver": "nbd", "file.export": export}
    image |= {f"file.server.{name}": value for name, value in server.items()}
    image["file.tls-creds"] = "tls0"
    return ["qemu-img", "info", "--object", credentials.qemu_object, "--image-opts", _options(image)]


def tellable(uris: Iterable[str]) -> list[str]:
    """Those of a server that command lines can be made of.

    Whoever hands it sockets (systemd) may have bound one to a name that is no path, or does not print: it is served.
    """
    found = []
    for uri in uris:
        with contextlib.suppress(UserError):
            Address.of(uri)
            found.append(uri)
    return found


def how_to_attach(uri: str, export: str, tls: TlsConfig, *, swap: bool = False) -> Iterator[str]:
    """Command lines for a newcomer: the kernel's client, which `swap` locks in memory, libnbd, QEMU."""
    address = Address.of(uri)
    credentials = Credentials(own=tls.client_ca is not None, user=None if tls.certificate else "NAME")
    if address.kernel_can_attach and not (address.over_tls and credentials.user):
        line = shlex.join(Attachment(address, export, swap=swap, credentials=credentials).command())
        yield f"{line}     # as root, after: modprobe nbd"
    yield shlex.join(["nbdinfo", address.uri(export, credentials)])
    yield shlex.join(qemu_img(address, export, credentials))
    if address.over_tls:
        yield f"where DIR is a directory with {', '.join(credentials.files.values())}"


def _options(pairs: Mapping[str, str]) -> str:
    """QEMU's options; a comma in a value is written twice."""
    return ",".join(f"{name}={value.replace(',', ',,')}" for name, value in pairs.items())
