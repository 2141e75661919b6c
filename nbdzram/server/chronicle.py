"""What single exports did in the last hours, beside what all of them did together (history.py).

A ring of KEPT samples for an export, SAMPLE_BYTES each and in line with the history's; none for one that did nothing
yet. At most EXPORTS have one, 3.7 MB in all however many there are: the one that did nothing for the longest time
gives way to one that does something.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from nbdzram.rates import Rates
from nbdzram.server.exports import Export
from nbdzram.status import ExportSample

EXPORTS = 256
SAMPLE = struct.Struct("5f")  # bytes read and written and requests, a second; median and 99th percentile, in seconds
SAMPLE_BYTES = SAMPLE.size
NOTHING = SAMPLE.pack(0, 0, 0, 0, 0)


class Chronicle:
    """Told by the history, sample by sample. `kept`: how many samples it has of an export, and of moments."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._rings: dict[Export, bytearray] = {}  # in the order in which they last did something
        self._count = 0  # of samples so far: the next one's place is this, modulo kept

    def add(self, rates: Mapping[Export, Rates], there: Mapping[Export, object]) -> None:
        """What those did that did anything since the last sample, of all that are `there` now."""
        self._rings = {export: ring for export, ring in self._rings.items() if export in there}
        at = self._count % self._kept * SAMPLE_BYTES
        for ring in self._rings.values():
            ring[at : at + SAMPLE_BYTES] = NOTHING
        for export, told in rates.items():
            ring = self._rings.pop(export) if export in self._rings else bytearray(self._kept * SAMPLE_BYTES)
            SAMPLE.pack_into(
                ring, at, told.read_bytes, told.write_bytes, told.requests, told.median_seconds, told.p99_seconds
            )
            self._rings[export] = ring
            if len(self._rings) > EXPORTS:
                del self._rings[next(iter(self._rings))]
        self._count += 1
        assert len(self._rings) <= EXPORTS

    def of(self, export: Export, moments: Sequence[float]) -> Iterator[ExportSample]:
        """What it did, at the last of these moments; nothing where it never did anything, or gave way."""
        ring = self._rings.get(export)
        if ring is None:
            return
        count = min(self._count, self._kept, len(moments))
        for index, at in enumerate(moments[len(moments) - count :], start=self._count - count):
            read, written, requests, median, worst = SAMPLE.unpack_from(ring, index % self._kept * SAMPLE_BYTES)
            yield ExportSample(at, read, written, requests, median, worst)
