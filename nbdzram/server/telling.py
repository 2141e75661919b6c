"""What a stream says of a server's exports: the records of each, and from where its blocks are told.

An export begins from its base, if the receiver has one; else from the earlier export of the stream that its table has
most in common with, as a clone has with what it was made of; else from nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.engine.walk import leaves_apart
from nbdzram.server.exports import Export
from nbdzram.stream.layout import ExportPart, Origin
from nbdzram.stream.sending import Source

CLOSEST_OF = 16
"""Exports that were told last, from which an origin is chosen: clones come behind what they were made of."""
LEAVES_LOOKED_AT = 65536
"""Of a table, while one is: 128 GiB, some milliseconds."""

Told = list[tuple[str, Pool, list[Source]]]
"""Pool by pool, with its name, what is to be sent."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the receiver has of an export: content with an identity, and a copy of it here."""

    name: str
    identity: int
    copy: Disk


def tell(
    exports: Sequence[Export],
    copies: Mapping[Disk, Disk],
    bases: Mapping[Export, Base],
    pools: Mapping[str, Pool],
    identities: Mapping[Export, int],
) -> Told:
    """What is to be said of each export, by its disk's copy. Looks at tables, some milliseconds: on a thread."""
    told: Told = []
    exports = sorted(exports, key=lambda export: export not in bases)  # a base says which folding domain it is, there
    domains: dict[int, int] = {}
    numbers = itertools.count()
    for pool_name in dict.fromkeys(export.pool_name for export in exports):
        sources: list[Source] = []
        for export in (one for one in exports if one.pool_name == pool_name):
            base, copy, disk = bases.get(export), copies[export.disk], export.disk
            domain = domains.setdefault(disk.domain, len(domains) + 1) if disk.private else 0
            closest = None if base else _closest(copy, [one for one in sources if one.part.domain == domain])
            origin = Origin.BASE if base else Origin.EXPORT if closest else Origin.HOLES
            part = ExportPart(
                number=next(numbers),
                name=export.name,
                size_bytes=copy.size_bytes,
                read_only=export.read_only,
                domain=domain,
                identity=identities[export],
                origin=origin,
                origin_number=base.identity if base else closest.part.number if closest else 0,
                origin_name=base.name if base else closest.part.name if closest else "",
                description=export.description,
                admits_nobody=export.access.nobody,
                addresses=export.access.addresses,
                certificates=export.access.certificates,
            )
            sources.append(Source(part=part, copy=copy, base=base.copy if base else None))
        told.append((pool_name, pools[pool_name], sources))
    return told


def _closest(copy: Disk, others: Sequence[Source]) -> Source | None:
    """The earlier copy that has most of its table in common with this one; None: there is nothing to gain."""
    closest, least = None, leaves_apart(copy, None, LEAVES_LOOKED_AT)
    for other in others[-CLOSEST_OF:]:
        apart = leaves_apart(copy, other.copy, least)
        if apart < least:
            closest, least = other, apart
    return closest
