"""Streams from pool to pool without a server: send some disks, receive a stream."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping

from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.server.received import place_in
from nbdzram.stream.layout import ExportPart, Origin
from nbdzram.stream.marks import Marks
from nbdzram.stream.receiving import Intake, Place, Received, Receiver
from nbdzram.stream.sending import Progress, Sending, Source, send

MOMENT_NS = 1_700_000_000_000_000_000


def part(number: int, disk: Disk, **given: object) -> ExportPart:
    said: dict[str, object] = {
        "number": number,
        "name": disk.name,
        "size_bytes": disk.size_bytes,
        "read_only": disk.read_only,
        "domain": 0,
        "identity": disk.identity,
        "origin": Origin.HOLES,
        "origin_number": 0,
        "origin_name": "",
        "description": "",
        "admits_nobody": False,
        "addresses": (),
        "certificates": (),
    }
    return ExportPart(**{**said, **given})  # type: ignore[arg-type]


def sent(
    *disks: Disk,
    bases: Mapping[str, Disk] | None = None,
    progress: Progress | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    domains: Mapping[str, int] | None = None,
    origins: Mapping[str, int] | None = None,
    out: io.BytesIO | None = None,
) -> bytes:
    """The stream of disks of one pool; `bases` by the name of the disk, `meanwhile` runs after the moment."""
    out = out or io.BytesIO()
    with begun(*disks, bases=bases, progress=progress, domains=domains, origins=origins) as sending:
        meanwhile()
        sending.write_to(out.write)  # type: ignore[arg-type]
    return out.getvalue()


@contextlib.contextmanager
def begun(
    *disks: Disk,
    bases: Mapping[str, Disk] | None = None,
    progress: Progress | None = None,
    domains: Mapping[str, int] | None = None,
    origins: Mapping[str, int] | None = None,
    bounds: Mapping[str, Bounds] | None = None,
    marks: Marks | None = None,
) -> Iterator[Sending]:
    """The same, that can be interrupted; its moment is kept as long as the context."""
    bases = bases or {}
    pool = disks[0].pool
    sources = [*disks, *bases.values()]
    copies = moment.snapshot_together(sources, [f"\ncopy {number}" for number in range(len(sources))])
    by_source = dict(zip([disk.name for disk in sources], copies, strict=True))
    try:
        told = []
        for number, disk in enumerate(disks):
            given: dict[str, object] = {"domain": (domains or {}).get(disk.name, 0)}
            given["bounds"] = (bounds or {}).get(disk.name, UNBOUND)
            base = bases.get(disk.name)
            if base is not None:
                given |= {"origin": Origin.BASE, "origin_number": base.identity, "origin_name": base.name}
            elif origins and disk.name in origins:
                given |= {"origin": Origin.EXPORT, "origin_number": origins[disk.name]}
            told.append(
                Source(
                    part=part(number, disk, **given),
                    copy=by_source[disk.name],
                    base=None if base is None else by_source[base.name],
                )
            )
        yield Sending([("default", pool, told)], MOMENT_NS, "tests", progress or Progress(), marks=marks)
    finally:
        moment.discard(copies)


def sent_from_pools(*disks: Disk) -> bytes:
    """The stream of disks that lie in pools of their own: pool0, pool1, ..."""
    out, copies, told = io.BytesIO(), [], []
    for number, disk in enumerate(disks):
        copies += moment.snapshot_together([disk], ["\ncopy"])
        told.append((f"pool{number}", disk.pool, [Source(part=part(number, disk), copy=copies[-1])]))
    send(told, MOMENT_NS, "tests", out.write, Progress())  # type: ignore[arg-type]
    for copy in copies:
        moment.discard([copy])
    return out.getvalue()


def receiver_in_pools(*pools: Pool) -> Receiver:
    places = {f"pool{number}": Place("", pool, lambda _: None) for number, pool in enumerate(pools)}
    return Receiver(lambda name: places[name], lambda told: told.name)


def receive(pool: Pool, stream: bytes, *, prefix: str = "", intake: Intake | None = None) -> list[Received]:
    """Concealed disks; see `reveal`."""
    return receiver_in(pool, prefix=prefix, intake=intake).receive(io.BytesIO(stream).read)


def receiver_in(pool: Pool, *, prefix: str = "", intake: Intake | None = None) -> Receiver:
    return Receiver(lambda name: place_in(name, pool), lambda told: prefix + told.name, intake)


def revealed(pool: Pool, stream: bytes, *, prefix: str = "") -> dict[str, Disk]:
    """The disks of a stream, offered."""
    disks = [received.disk for received in receive(pool, stream, prefix=prefix)]
    for disk in disks:
        moment.finish(disk)
        moment.reveal(disk)
    return {disk.name: disk for disk in disks}


def whole(disk: Disk) -> bytes:
    return disk.read(0, disk.size_bytes)
