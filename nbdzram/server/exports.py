"""The exports on offer: who may see them, who is attached, what passed through."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdzram.engine.disk import Disk
from nbdzram.errors import ConfigError, ExportExists, NoSuchExport
from nbdzram.server.traffic import Traffic
from nbdzram.status import ExportStatus

if TYPE_CHECKING:
    from nbdzram.server.session import Session

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAPPED_PREFIX = 96  # bits in front of the IPv4 address in ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as we know yet."""

    text: str  # for the log: 192.0.2.7:5555, or unix
    address: Address | None = None  # None: not an IP connection
    certificate_names: frozenset[str] = frozenset()  # verified under TLS: common name and DNS names


class Export:
    """A disk offered by name."""

    def __init__(
        self,
        *,
        name: str,
        disk: Disk,
        pool_name: str,
        read_only: bool = False,
        description: str = "",
        allow_addresses: tuple[str, ...] = (),
        allow_certificates: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.disk = disk
        self.pool_name = pool_name
        self.read_only = read_only
        self.description = description
        self.allow_addresses = allow_addresses
        self.allow_certificates = allow_certificates
        self.traffic = Traffic()
        self.connections: set[Session] = set()
        self._networks = tuple(_network(name, text) for text in allow_addresses)

    @property
    def size_bytes(self) -> int:
        """Now: a disk may be resized."""
        return self.disk.size_bytes

    def admits(self, peer: Peer) -> bool:
        """May this peer know of it? A peer without an IP address is local: the socket's mode decided."""
        if self._networks and peer.address is not None and not _inside(peer.address, self._networks):
            return False
        return not self.allow_certificates or not peer.certificate_names.isdisjoint(self.allow_certificates)

    def status(self) -> ExportStatus:
        """What the server tells of it, at this moment."""
        stats, io_stat = self.disk.stats(), self.traffic.io_stat()
        return ExportStatus(
            name=self.name,
            pool=self.pool_name,
            size_bytes=stats.size,
            read_only=self.read_only,
            description=self.description,
            stored_bytes=stats.stored,
            same_filled_bytes=stats.same_filled,
            connections=len(self.connections),
            failed_reads=io_stat.failed_reads,
            failed_writes=io_stat.failed_writes,
            invalid_io=io_stat.invalid_io,
            notify_free=io_stat.notify_free,
            operations=self.traffic.operations(),
        )


class Exports:
    """The registry, in the order of addition."""

    def __init__(self, default_name: str | None = None) -> None:
        self.default_name = default_name
        self._by_name: dict[str, Export] = {}

    def __iter__(self) -> Iterator[Export]:
        return iter(tuple(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, export: Export) -> None:
        """Offer it. Raises ExportExists."""
        if export.name in self._by_name:
            raise ExportExists(f"there is an export '{export.name}' already; choose another name or remove it first")
        self._by_name[export.name] = export

    def get(self, name: str) -> Export:
        """By its exact name. Raises NoSuchExport."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(list(self._by_name)[:10]) or "none"
            raise NoSuchExport(f"there is no export '{name}'; there are: {known}") from None

    def resolve(self, name: str) -> Export | None:
        """As a client means it: the empty name is the default export, or the only one."""
        if name or "" in self._by_name:
            return self._by_name.get(name)
        if self.default_name is not None:
            return self._by_name.get(self.default_name)
        return next(iter(self._by_name.values())) if len(self._by_name) == 1 else None

    def remove(self, name: str) -> Export:
        """Offer it no more; closing its connections is for NbdServer.detach. Raises NoSuchExport."""
        export = self.get(name)
        del self._by_name[name]
        return export


class PeerDirectory:
    """What one peer may see (nbd.handshake.Directory)."""

    def __init__(self, exports: Exports, peer: Peer) -> None:
        self._exports = exports
        self._peer = peer

    def find(self, name: str) -> Export | None:
        """The export, unless it does not exist or does not admit this peer: outside both look the same."""
        export = self._exports.resolve(name)
        return export if export is not None and export.admits(self._peer) else None

    def offers(self) -> Iterator[Export]:
        """Every export that admits this peer."""
        return (export for export in self._exports if export.admits(self._peer))


def _network(name: str, text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(
            f"export {name!r}: allow_addresses {text!r} is not an address or CIDR network ({error}); "
            "write for example 192.0.2.0/24"
        ) from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is None or network.prefixlen < MAPPED_PREFIX:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - MAPPED_PREFIX))


def _inside(address: Address, networks: tuple[Network, ...]) -> bool:
    """IPv4 clients of a dual-stack socket appear as ::ffff:a.b.c.d and are meant as a.b.c.d, as in `_network`."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    actual = mapped or address
    return any(actual.version == network.version and actual in network for network in networks)
