"""Prometheus' text format, version 0.0.4, written directly for the families with many samples.

prometheus_client was measured first: 102 ms for 100 exports (6,800 samples), during which no client is served; one
line a sample, with an export's labels rendered once, takes 15 ms. The numbers stand in
docs/decisions/0001-write-hot-metric-families-directly.md; tests hold the output against prometheus_client's own parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from nbdzram.status import ServerStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, float]
"""What follows the family's name on a line (a suffix, labels), and the value."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Where a family's samples come from, and the labels that each of them carries."""

    labels: tuple[str, ...]
    of: Callable[[ServerStatus], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: name, type, help, and its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    says: str
    samples: Samples

    def lines(self, status: ServerStatus) -> Iterator[str]:
        """The family's text, sample by sample; nothing if it has none."""
        name = self.name
        heading = f"# HELP {name} {self.says}\n# TYPE {name} {self.kind}\n"
        for rest, value in self.samples.of(status):
            yield f"{heading}{name}{rest} {value!r}\n"
            heading = ""


def labels(**pairs: str) -> str:
    """A label set in braces."""
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in pairs.items()) + "}"


def escape(value: str) -> str:
    """A label's value as it stands between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def histogram(
    label_set: str, bounds: Iterable[tuple[str, int]], counts: tuple[int, ...], total: float
) -> Iterator[Sample]:
    """A histogram's samples, from counts a bucket. `bounds`: a bound's text, and how many buckets lie below it."""
    opened = label_set[:-1] + ","
    cumulative = tuple(accumulate(counts))
    for text, below in bounds:
        yield f'_bucket{opened}le="{text}"}}', cumulative[below - 1]
    yield f'_bucket{opened}le="+Inf"}}', cumulative[-1]
    yield f"_sum{label_set}", total
    yield f"_count{label_set}", cumulative[-1]
