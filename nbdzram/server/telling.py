"""What a stream says of a server's exports: the records of each, and from where its blocks are told.

An export begins from its base, if the receiver has one; else from the earlier export of the stream that its table has
most in common with, or what else the receiver has, as a clone has with what it was made of; else from nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbdzram.bounds import Bounds
from nbdzram.config import Access
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.walk import blocks_apart, leaves_apart
from nbdzram.server.exports import Export
from nbdzram.stream.layout import ExportPart, Origin
from nbdzram.stream.sending import Source

CLOSEST_OF = 16
"""Exports that were told last, from which an origin is chosen: clones come behind what they were made of."""
FEW_LEAVES = 8
FEW_BLOCKS = FEW_LEAVES * 512
LEAVES_LOOKED_AT = 65536
"""Of a table, while one is: 128 GiB, some milliseconds."""
Told = list[tuple[str, Pool, list[Source]]]
"""Pool by pool, with its name, what is to be sent."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An export, as it was when the roster was read; `export` itself has another disk once it is rolled back."""

    export: Export
    name: str
    pool_name: str
    disk: Disk
    size_bytes: int
    read_only: bool
    description: str
    access: Access
    bounds: Bounds
    identity: int  # of its disk's content, if nobody may write that

    @classmethod
    def of(cls, export: Export) -> Seen:
        """As it is now."""
        disk = export.disk
        return cls(
            export=export,
            name=export.name,
            pool_name=export.pool_name,
            disk=disk,
            size_bytes=disk.size_bytes,
            read_only=export.read_only,
            description=export.description,
            access=export.access,
            bounds=export.bounds,
            identity=disk.identity,
        )


@dataclass(frozen=True, slots=True)
class Base:
    """What the receiver has of an export: content with an identity, and a copy of it here."""

    name: str
    identity: int
    copy: Disk

    def is_alike(self, disk: Disk) -> bool:
        """Whether the other disk may share objects with it."""
        return self.copy.pool is disk.pool and self.copy.private == disk.private and self.copy.domain == disk.domain


def tell(
    exports: Sequence[Seen],
    copies: Mapping[Disk, Disk],
    bases: Mapping[Disk, Base],
    identities: Mapping[Disk, int],
    *,
    also_there: Sequence[Base] = (),
) -> Told:
    """What is to be said of each export; all the rest by its disk. Looks at tables, some milliseconds: on a thread.

    also_there: what else the receiver has; an export without a base begins from the closest of these.
    """
    told: Told = []
    chosen = {
        export.disk: bases.get(export.disk) or _closest_base(copies[export.disk], also_there) for export in exports
    }
    exports = sorted(exports, key=lambda one: chosen[one.disk] is None)  # a base says which folding domain it is, there
    domains: dict[int, int] = {}
    numbers = itertools.count()
    for pool_name in dict.fromkeys(export.pool_name for export in exports):
        sources: list[Source] = []
        for export in (one for one in exports if one.pool_name == pool_name):
            base, copy = chosen[export.disk], copies[export.disk]
            domain = domains.setdefault(copy.domain, len(domains) + 1) if copy.private else 0
            closest = None if base else _closest(copy, [one for one in sources if one.part.domain == domain])
            origin = Origin.BASE if base else Origin.EXPORT if closest else Origin.HOLES
            part = ExportPart(
                number=next(numbers),
                name=export.name,
                size_bytes=copy.size_bytes,
                read_only=export.read_only,
                domain=domain,
                identity=identities[export.disk],
                origin=origin,
                origin_number=base.identity if base else closest.part.number if closest else 0,
                origin_name=base.name if base else closest.part.name if closest else "",
                description=export.description,
                admits_nobody=export.access.nobody,
                addresses=export.access.addresses,
                certificates=export.access.certificates,
                bounds=export.bounds,
            )
            sources.append(Source(part=part, copy=copy, base=base.copy if base else None))
        told.append((pool_name, sources[0].copy.pool, sources))
    return told


def _closest_base(copy: Disk, bases: Sequence[Base]) -> Base | None:
    """The one among what the receiver has that the copy has most in common with; None: there is nothing to gain."""
    alike = [base for base in bases if base.is_alike(copy)]
    found = _closest_of(copy, [base.copy for base in alike])
    return None if found is None else alike[found]


def _closest(copy: Disk, others: Sequence[Source]) -> Source | None:
    """The same, among what was told before."""
    latest = others[-CLOSEST_OF:]
    found = _closest_of(copy, [other.copy for other in latest])
    return None if found is None else latest[found]


def _closest_of(copy: Disk, others: Sequence[Disk]) -> int | None:
    """Leaves are compared first; blocks, where there are but a few, as those of small disks are never the same."""
    if not others:
        return None
    closest, least = None, leaves_apart(copy, None, LEAVES_LOOKED_AT)
    fewest = blocks_apart(copy, None, FEW_BLOCKS) if least <= FEW_LEAVES else 0
    for number, other in enumerate(others):
        apart = leaves_apart(copy, other, least + 1)
        blocks = blocks_apart(copy, other, FEW_BLOCKS) if apart <= FEW_LEAVES else 0
        if (apart, blocks) < (least, fewest):
            closest, least, fewest = number, apart, blocks
    return closest
