"""How clients attach: the nbd-client line, the nbdtab line, and URIs for libnbd and QEMU.

Sources: nbd-client(8), nbdtab(5), and doc/uri.md of the NBD project for the URI's parts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from nbdzram.config import DEFAULT_PORT
from nbdzram.errors import UserError


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a server, read from its URI: either host and port, or the path of a unix socket."""

    scheme: str
    host: str
    port: int
    path: str | None

    @classmethod
    def of(cls, uri: str) -> Address:
        """Read nbd://HOST:PORT or nbd+unix:///?socket=PATH (nbds for TLS). Raises UserError."""
        parts = urlsplit(uri)
        scheme, _, transport = parts.scheme.partition("+")
        if scheme not in {"nbd", "nbds"} or transport not in {"", "tcp", "unix", "vsock"}:
            raise UserError(f"'{uri}' is not an NBD URI such as nbd://127.0.0.1:10809 or nbd+unix:///?socket=PATH")
        path = parse_qs(parts.query).get("socket", [None])[0]
        if transport == "unix" and path is None:
            raise UserError(f"'{uri}' names no socket; write nbd+unix:///?socket=PATH")
        return cls(parts.scheme, parts.hostname or "127.0.0.1", parts.port or DEFAULT_PORT, path)

    @property
    def kernel_can_attach(self) -> bool:
        """nbd-client speaks TCP and unix sockets."""
        return not self.scheme.endswith("+vsock")

    def uri(self, export: str) -> str:
        """The URI of one export, for libnbd and QEMU."""
        name = quote(export, safe="")
        if self.path is not None:
            return f"{self.scheme}:///{name}?socket={quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}/{name}"


def nbd_client(address: Address, export: str, device: str, *, connections: int = 1, swap: bool = False) -> list[str]:
    """The command that attaches an export to a kernel device."""
    where = ["-unix", address.path] if address.path is not None else [address.host, str(address.port)]
    options = ["-name", export]
    options += ["-connections", str(connections)] if connections > 1 else []
    options += ["-swap"] if swap else []
    return ["nbd-client", *where, device, *options]


def nbdtab_line(address: Address, export: str, device: str, *, connections: int = 1, swap: bool = False) -> str:
    """The line of /etc/nbdtab with which `nbd-client nbdN` and nbd@nbdN.service attach it."""
    options = ["unix"] if address.path is not None else [f"port={address.port}"]
    options += [f"conns={connections}"] if connections > 1 else []
    options += ["swap"] if swap else []
    options += ["persist"]
    return f"{device.removeprefix('/dev/')} {address.path or address.host} {export} {','.join(options)}"


def how_to_attach(uri: str, export: str) -> Iterator[str]:
    """Command lines for a newcomer: the kernel's client, libnbd, QEMU."""
    address = Address.of(uri)
    if address.kernel_can_attach:
        line = shlex.join(nbd_client(address, export, "/dev/nbd0"))
        yield f"{line}     # as root, after: modprobe nbd"
    yield f"nbdinfo '{address.uri(export)}'"
    yield f"qemu-img info '{address.uri(export)}'"
