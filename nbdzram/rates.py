"""What happened a second between two statuses of one server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nbdzram.status import OperationStatus, ServerStatus

PAYLOAD = ("read", "write")
"""Operations that carry bytes; trim, write_zeroes and cache name ranges, whose latency says nothing of a transfer."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Traffic a second, and how long reads and writes took."""

    read_bytes: float = 0.0
    write_bytes: float = 0.0
    requests: float = 0.0
    median_seconds: float = 0.0  # 0: there was no read or write
    p99_seconds: float = 0.0


def between(before: ServerStatus, after: ServerStatus) -> tuple[Rates, dict[str, Rates]]:
    """Of all exports together, and of each by name. One that is new, or another one of its name, has no rates yet."""
    seconds = after.uptime_seconds - before.uptime_seconds
    if seconds <= 0 or before.started_at != after.started_at:
        return Rates(), {}
    bounds = after.latency_bounds_seconds
    old = {export.name: export for export in before.exports}
    pairs = {
        export.name: (old[export.name].operations, export.operations)
        for export in after.exports
        if export.name in old and _is_the_same(old[export.name].operations, export.operations)
    }
    return rates_of(pairs.values(), seconds, bounds), {
        name: rates_of([pair], seconds, bounds) for name, pair in pairs.items()
    }


def _is_the_same(before: Mapping[str, OperationStatus], after: Mapping[str, OperationStatus]) -> bool:
    """Whether nothing fell: else it was removed and made again, and what it did is no difference of the two."""
    return all(name in after and _went_on(old, after[name]) for name, old in before.items())


def _went_on(old: OperationStatus, new: OperationStatus) -> bool:
    then, now = ((one.requests, one.bytes, *one.latency_counts) for one in (old, new))
    return len(then) == len(now) and all(later >= earlier for earlier, later in zip(then, now, strict=True))


def quantile(counts: Sequence[int], bounds: Sequence[float], share: float) -> float:
    """The time below which `share` of the requests took, interpolated in its bucket; 0 without requests.

    counts[k] requests lie between bounds[k - 1] and bounds[k]; the last bucket lies above every bound.
    """
    left = sum(counts) * share
    if not left:
        return 0.0
    for index, count in enumerate(counts):
        if count >= left:
            if index >= len(bounds):
                return bounds[-1]
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * left / count
        left -= count
    return bounds[-1]


def rates_of(
    pairs: Iterable[tuple[Mapping[str, OperationStatus], Mapping[str, OperationStatus]]],
    seconds: float,
    bounds: Sequence[float],
) -> Rates:
    """Of exports, each by its operations before and after `seconds`."""
    moved = dict.fromkeys(PAYLOAD, 0)
    requests, counts = 0, [0] * (len(bounds) + 1)
    for before, after in pairs:
        for name, new in after.items():
            old = before.get(name)
            requests += new.requests - (old.requests if old else 0)
            if name in moved:
                moved[name] += new.bytes - (old.bytes if old else 0)
                _add(counts, old, new)
    return Rates(
        read_bytes=moved["read"] / seconds,
        write_bytes=moved["write"] / seconds,
        requests=requests / seconds,
        median_seconds=quantile(counts, bounds, 0.5),
        p99_seconds=quantile(counts, bounds, 0.99),
    )


def _add(counts: list[int], old: OperationStatus | None, new: OperationStatus) -> None:
    for index, count in enumerate(new.latency_counts[: len(counts)]):
        counts[index] += count - (old.latency_counts[index] if old else 0)
