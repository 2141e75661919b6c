"""The exports on offer: who may see them, who is attached, what passed through.

Invariants
1. Nobody attaches to an export that is `changing`: whoever makes a change that destroys says so first, deals with those
   who are attached, and only then destroys.
2. An export's rules are named when it is made: there is no default that admits everyone.
3. Whoever is attached was admitted by the rules as they are now, or is being ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.config import Access
from nbdzram.engine.disk import Disk
from nbdzram.errors import ConfigError, ExportExists, NoSuchExport, UserError
from nbdzram.nbd.constants import Reply
from nbdzram.nbd.handshake import Offer
from nbdzram.nbd.options import Refusal
from nbdzram.server.traffic import Traffic
from nbdzram.sessions.throttle import Throttle
from nbdzram.status import ExportStatus
from nbdzram.units import some_of

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAMED_CLIENTS = 5  # in a refusal: enough to know whom to ask

MAPPED_PREFIX = 96  # bits in front of the IPv4 address in ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as we know yet."""

    text: str  # for the log: 192.0.2.7:5555, or unix
    address: Address | None = None  # None: local, or an IP connection whose other end cannot be told any more
    certificate_names: frozenset[str] = frozenset()  # verified under TLS: common name and DNS names
    local: bool = False  # a unix socket, whose file's mode decided already, or vsock
    account: str = "local"  # of a local one: whose it is, as the kernel says


class Served(Protocol):
    """Who is attached to an export, as far as that is its business (attached.py)."""

    @property
    def peer(self) -> Peer:
        """Who it is."""

    @property
    def read_only(self) -> bool:
        """What it was told when it attached."""

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done once nothing of it is under way any more."""

    def go_on(self) -> None:
        """The export's limits are others than they were."""

    def drain(self) -> None:
        """Be answered, and end."""

    def abort(self) -> None:
        """End."""


class Export:
    """A disk offered by name."""

    def __init__(
        self,
        *,
        name: str,
        disk: Disk,
        pool_name: str,
        access: Access,
        read_only: bool,
        description: str = "",
        bounds: Bounds = UNBOUND,
    ) -> None:
        self.name = name
        self.disk = disk
        self.pool_name = pool_name
        self.traffic = Traffic()
        self.throttle = Throttle()
        self.connections: set[Served] = set()
        self.changing: str | None = None  # what is being done to it: resized, reset, removed
        self.set_rules(access=access, read_only=read_only, description=description)
        self.set_bounds(bounds)

    def set_rules(self, *, access: Access, read_only: bool, description: str) -> None:
        """From now on. Who is attached already is not asked again: see `unqualified`. Raises ConfigError."""
        self._networks = tuple(_network(self.name, text) for text in access.addresses)
        if not read_only and self.disk.identity:
            self.disk.identify(0)  # what clients write makes it other content
        self.access = access
        self.read_only = read_only
        self.description = description

    def set_bounds(self, bounds: Bounds) -> None:
        """From now on, for requests that wait already too. What is stored beyond a quota stays."""
        self.bounds = bounds
        self.disk.quota_bytes = bounds.quota_bytes
        self.throttle.limit((bounds.iops, bounds.iops_burst), (bounds.bandwidth_bytes, bounds.bandwidth_burst_bytes))
        for session in self.connections:
            session.go_on()

    @property
    def size_bytes(self) -> int:
        """Now: a disk may be resized."""
        return self.disk.size_bytes

    def admits(self, peer: Peer) -> bool:
        """May this peer know of it? Of a local one only certificates are asked: the socket's mode decided."""
        if self.access.nobody:
            return False
        if self._networks and not peer.local and (peer.address is None or not _inside(peer.address, self._networks)):
            return False
        certificates = self.access.certificates
        return not certificates or not peer.certificate_names.isdisjoint(certificates)

    def keeps(self, peer: Peer, *, read_only: bool) -> bool:
        """May one stay who attached by other rules, to read alone or to write?"""
        return self.admits(peer) and (read_only or not self.read_only)

    def unqualified(self) -> list[Served]:
        """Who is attached and, as the rules are now, would not be, or not for writing."""
        return [one for one in self.connections if not self.keeps(one.peer, read_only=one.read_only)]

    @contextlib.contextmanager
    def change(self, doing: str) -> Iterator[None]:
        """While in here it is `doing` (resized, reset, removed), and nobody attaches."""
        assert self.changing is None
        self.changing = doing
        try:
            yield
        finally:
            self.changing = None

    def require_detached(self, verb: str, *, remedy: str) -> None:
        """Raises UserError, which names the clients and the remedy."""
        if self.connections:
            clients = "1 client is" if len(self.connections) == 1 else f"{len(self.connections)} clients are"
            names = some_of(self.clients(), NAMED_CLIENTS)
            raise UserError(f"cannot {verb} the export '{self.name}': {clients} attached ({names}); {remedy}")

    def clients(self) -> list[str]:
        """Who is attached, for people, in a steady order."""
        return sorted(session.peer.text for session in self.connections)

    def status(self) -> ExportStatus:
        """What the server tells of it, at this moment."""
        stats, (operations, io_stat) = self.disk.stats(), self.traffic.told()
        throttled, throttled_ns = self.traffic.throttled()
        return ExportStatus(
            name=self.name,
            pool=self.pool_name,
            size_bytes=stats.size,
            read_only=self.read_only,
            description=self.description,
            admits=self.access.admits,
            allow_addresses=self.access.addresses,
            allow_certificates=self.access.certificates,
            private=self.disk.private,
            bounds=self.bounds,
            stored_bytes=stats.stored,
            same_filled_bytes=stats.same_filled,
            connections=len(self.connections),
            failed_reads=io_stat.failed_reads,
            failed_writes=io_stat.failed_writes,
            invalid_io=io_stat.invalid_io,
            notify_free=io_stat.notify_free,
            throttled_requests=throttled,
            throttled_seconds=throttled_ns / 1e9,
            operations=operations,
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

    def __contains__(self, name: str) -> bool:
        """Whether there is an export of exactly this name."""
        return name in self._by_name

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
            raise NoSuchExport.among(self._by_name, name) from None

    def resolve(self, name: str) -> Export | None:
        """As a client means it: the empty name is the default export, or the only one."""
        if name or "" in self._by_name:
            return self._by_name.get(name)
        if self.default_name is not None:
            return self._by_name.get(self.default_name)
        return next(iter(self._by_name.values())) if len(self._by_name) == 1 else None

    def attachable(self, offer: Offer, peer: Peer) -> Export:
        """What was found a moment ago, if `peer` may attach to it now. Raises NoSuchExport, which says why not."""
        export = self._by_name.get(offer.name)
        if export is not offer or export is None:
            raise NoSuchExport(f"export {offer.name!r} was removed meanwhile")
        if export.changing is not None:
            raise NoSuchExport(f"export {export.name!r} is being {export.changing}; try again in a moment")
        if not export.admits(peer):
            raise NoSuchExport(f"export {export.name!r} does not admit this client any more")
        return export

    def arrange(self, names: Iterable[str]) -> None:
        """List those that are there of `names` first, in their order."""
        first = {name: self._by_name[name] for name in names if name in self._by_name}
        self._by_name = first | self._by_name

    def rename(self, name: str, new_name: str) -> None:
        """Offer it under another name, in its place among the others. Who is attached stays. Raises NoSuchExport."""
        export = self.get(name)
        assert new_name not in self._by_name
        export.name = new_name
        self._by_name = {other.name: other for other in self._by_name.values()}

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
        """The export, unless it does not exist or does not admit this peer: outside both look the same.

        Raises Refusal for one that is being changed, to those whom it admits.
        """
        export = self._exports.resolve(name)
        if export is None or not export.admits(self._peer):
            return None
        try:
            return self._exports.attachable(export, self._peer)
        except NoSuchExport as error:
            raise Refusal(Reply.ERR_UNKNOWN, str(error)) from None

    def offers(self) -> Iterator[Export | None]:
        """Every export that admits this peer, and None for each that does not: looking took its time."""
        return (export if export.admits(self._peer) else None for export in self._exports)


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
