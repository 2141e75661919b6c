"""What a stream says of its exports, held to what a server admits."""

from __future__ import annotations

import dataclasses

from nbdzram import values
from nbdzram.config import EVERYONE, Access
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.errors import UnknownFormat
from nbdzram.server.state import Declared, ExportRecord
from nbdzram.stream.layout import ExportPart
from nbdzram.stream.receiving import Place, Received


def place_in(name: str, pool: Pool) -> Place:
    """Where exports go that are received into a pool."""

    def find_base(part: ExportPart) -> Disk | None:
        return next((disk for disk in pool.disks() if disk.identity == part.origin_number), None)

    return Place(name, pool, find_base)


def valid_name(prefix: str, part: ExportPart) -> str:
    """The name of an export that is received, all of whose values are right. Raises UnknownFormat: they were where it
    was sent, by another version, or by a Python that prints more of a name."""
    try:
        values.export_size(part.size_bytes)
        values.description(part.description)
        values.several(values.network)(list(part.addresses))
        values.several(values.certificate_name)(list(part.certificates))
        for bound, read in values.BOUNDS.items():
            read(getattr(part.bounds, bound))
        return values.export_name(prefix + part.name)
    except ValueError as error:
        raise UnknownFormat(f"the stream's export {part.name[:80]!r} cannot be offered: {error}") from None


def as_declared(record: ExportRecord, holds: ExportRecord) -> ExportRecord:
    """Of a name that is declared, what `holds` of that: where the declaration says who may attach, or that nobody may
    write, no stream opens it. Where it says nothing, what is told of the disk holds."""
    access = record.access if holds.access == EVERYONE else holds.access
    return dataclasses.replace(record, access=access, read_only=record.read_only or holds.read_only)


def received_record(one: Received, declared: Declared | None) -> ExportRecord:
    """What is to be remembered of a disk that was received, and what is declared of its name: its bounds among it,
    whatever the stream says of them."""
    part = one.part
    return ExportRecord(
        pool=one.place.name,
        size_bytes=one.disk.size_bytes,
        read_only=part.read_only,
        description=part.description,
        access=Access(addresses=part.addresses, certificates=part.certificates, nobody=part.admits_nobody),
        bounds=part.bounds if declared is None else declared.bounds,
        removed=False,
        declared=declared,
    )
